"""The messages of an ONNX file that the edge reads, declared for protobuf: no ``onnx`` package on a device.

Numbers and types are those of ``onnx.proto`` (https://github.com/onnx/onnx, IR version 10). Fields that are not
declared here stay as they are when a message is written again. The messages live in a pool of their own, where they
cannot clash with those of the ``onnx`` package.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "trellis.onnx"
_KINDS = {"int32": 5, "int64": 3, "float": 2, "double": 1, "string": 9, "bytes": 12, "uint64": 4}

# message: {field: (number, type, repeated)}; a type that starts with a capital is a message.
_FIELDS: dict[str, dict[str, tuple[int, str, bool]]] = {
    "StringStringEntry": {"key": (1, "string", False), "value": (2, "string", False)},
    "OperatorSetId": {"domain": (1, "string", False), "version": (2, "int64", False)},
    "Model": {
        "ir_version": (1, "int64", False),
        "producer_name": (2, "string", False),
        "graph": (7, "Graph", False),
        "opset_import": (8, "OperatorSetId", True),
        "metadata_props": (14, "StringStringEntry", True),
        "training_info": (20, "Opaque", True),
        "functions": (25, "Opaque", True),
    },
    "Graph": {
        "node": (1, "Node", True),
        "name": (2, "string", False),
        "initializer": (5, "Tensor", True),
        "input": (11, "ValueInfo", True),
        "output": (12, "ValueInfo", True),
        "value_info": (13, "ValueInfo", True),
        "sparse_initializer": (15, "Opaque", True),
    },
    "Node": {
        "input": (1, "string", True),
        "output": (2, "string", True),
        "name": (3, "string", False),
        "op_type": (4, "string", False),
        "attribute": (5, "Attribute", True),
        "domain": (7, "string", False),
    },
    "Attribute": {
        "name": (1, "string", False),
        "f": (2, "float", False),
        "i": (3, "int64", False),
        "t": (5, "Tensor", False),
        "g": (6, "Graph", False),
        "tensors": (10, "Tensor", True),
        "graphs": (11, "Graph", True),
        "type": (20, "int32", False),
        "sparse_tensor": (22, "Opaque", False),
        "sparse_tensors": (23, "Opaque", True),
    },
    "Tensor": {
        "dims": (1, "int64", True),
        "data_type": (2, "int32", False),
        "float_data": (4, "float", True),
        "int32_data": (5, "int32", True),
        "int64_data": (7, "int64", True),
        "name": (8, "string", False),
        "raw_data": (9, "bytes", False),
        "double_data": (10, "double", True),
        "external_data": (13, "StringStringEntry", True),
        "data_location": (14, "int32", False),
    },
    "ValueInfo": {"name": (1, "string", False), "type": (2, "Type", False)},
    "Type": {"tensor_type": (1, "TensorType", False)},
    "TensorType": {"elem_type": (1, "int32", False), "shape": (2, "Shape", False)},
    "Shape": {"dim": (1, "Dimension", True)},
    "Dimension": {"dim_value": (1, "int64", False), "dim_param": (2, "string", False)},
    "Opaque": {},
}


def _declare() -> Any:
    """Return a factory of message classes by name."""
    # proto3, unlike ONNX's own proto2, takes only text for strings; on the wire the two are the same.
    file = descriptor_pb2.FileDescriptorProto(name="trellis/onnx.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            declared = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if kind in _KINDS:
                declared.type = _KINDS[kind]
                if repeated and kind not in ("string", "bytes"):
                    declared.options.packed = field != "dims"
            else:
                declared.type, declared.type_name = 11, f".{_PACKAGE}.{kind}"
    dimension = file.message_type[list(_FIELDS).index("Dimension")]
    dimension.oneof_decl.add(name="value")
    for declared in dimension.field:
        declared.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


_class: Final = _declare()

Model: Final[Any] = _class("Model")
Node: Final[Any] = _class("Node")
Tensor: Final[Any] = _class("Tensor")
