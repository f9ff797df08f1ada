"""A node written from docs/wire.md: gRPC, the protocol's generated messages, NumPy, and nothing else of Trellis.

    python minimal_node.py HOST:PORT CLIENT STEP EXAMPLES

It "trains" by adding STEP to every weight, and says it did so on EXAMPLES examples.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from typing import Any

import grpc
import numpy as np

from trellis.wire.generated import link_pb2 as pb

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}


class Node:
    def __init__(self, address: str, client: int, step: float, examples: int) -> None:
        self.channel = grpc.insecure_channel(address)
        self.client, self.step, self.examples = client, step, examples

    def call(self, shape: str, name: str, kind: Any) -> Any:
        return getattr(self.channel, shape)(
            f"/trellis.v1.LinkService/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=kind.FromString,
        )

    def run(self) -> str:
        joined = self.call("unary_unary", "Join", pb.JoinResponse)(
            pb.JoinRequest(protocol=1, node=f"minimal-{self.client}", instance="made once", client=self.client, kind=1)
        )
        self.session, self.limit, self.chunk = joined.session, joined.max_payload_bytes, joined.chunk_bytes
        done: dict[str, bytes] = {}
        for event in self.call("unary_stream", "Work", pb.WorkResponse)(pb.WorkRequest(session=self.session)):
            what = event.WhichOneof("event")
            if what == "goodbye":
                return str(event.goodbye.reason)
            if what == "task":
                task = event.task
                if task.id not in done:
                    done[task.id] = self.answer(task)
                verdict = self.submit(task.id, done[task.id])
                sys.stdout.write(f"{task.kind} {pb.Verdict.Name(verdict)}\n")
        raise ConnectionError("the stream ended without a goodbye")

    def answer(self, task: Any) -> bytes:
        received = {record.name: read(self.payload(record.payload))["record"] for record in task.records}
        arrays, config = received["arrays"], received["config"]
        assert config["server-round"] >= 1
        if task.kind == "train":
            moved = {name: (values + self.step).astype(values.dtype) for name, values in arrays.items()}
            return write(moved, {"num-examples": self.examples, "loss": 1.0 / config["server-round"]})
        largest = max(float(abs(values).max()) for values in arrays.values())
        return write(None, {"num-examples": self.examples, "loss": largest, "accuracy": 0.5})

    def payload(self, payload: Any) -> bytes:
        assert max(payload.size, payload.decoded_size) <= self.limit
        data = payload.inline
        if not data:
            request = pb.FetchRequest(session=self.session, digest=payload.digest, offset=0)
            data = b"".join(part.data for part in self.call("unary_stream", "Fetch", pb.FetchResponse)(request))
        assert payload.encoding == 1, "this node reads no zstd"
        assert len(data) == payload.size == payload.decoded_size
        assert hashlib.sha256(data).hexdigest() == payload.digest
        return bytes(data)

    def submit(self, task: str, data: bytes) -> int:
        described = pb.Payload(
            digest=hashlib.sha256(data).hexdigest(), size=len(data), decoded_size=len(data), encoding=1
        )
        parts = [pb.SubmitRequest(header=pb.SubmitHeader(session=self.session, task_id=task, answer=described))]
        parts += [pb.SubmitRequest(data=data[i : i + self.chunk]) for i in range(0, len(data), self.chunk)]
        return int(self.call("stream_unary", "Submit", pb.SubmitResponse)(iter(parts)).verdict)


def read(data: bytes) -> dict[str, dict[str, Any]]:
    """Take records apart."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    about = header.pop("__metadata__")
    assert about["format"] == "trellis-records-1"
    records = {}
    for r, (name, entry) in enumerate(json.loads(about["records"]).items()):
        if entry["kind"] == "arrays":
            records[name] = {key: array(header[f"{r}/{a}"], body) for a, key in enumerate(entry["names"])}
        else:
            records[name] = {key: plain(value) for key, value in entry["values"].items()}
    return records


def array(entry: dict[str, Any], body: bytes) -> Any:
    start, end = entry["data_offsets"]
    return np.frombuffer(body[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])


def plain(value: Any) -> Any:
    return float.fromhex(value["float"]) if isinstance(value, dict) and "float" in value else value


def write(arrays: dict[str, Any] | None, metrics: dict[str, int | float]) -> bytes:
    """Put an answer together: the arrays, where there are some, and the metrics."""
    header: dict[str, Any] = {}
    about: dict[str, Any] = {}
    body = b""
    if arrays is not None:
        about["arrays"] = {"kind": "arrays", "names": list(arrays)}
        for a, values in enumerate(arrays.values()):
            data = np.ascontiguousarray(values).tobytes()
            span = [len(body), len(body) + len(data)]
            header[f"0/{a}"] = {"dtype": CODES[values.dtype], "shape": list(values.shape), "data_offsets": span}
            body += data
    values = {name: {"float": value.hex()} if isinstance(value, float) else value for name, value in metrics.items()}
    about["metrics"] = {"kind": "metrics", "values": values}
    header["__metadata__"] = {"format": "trellis-records-1", "records": json.dumps(about)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


if __name__ == "__main__":
    sys.stdout.write(f"{Node(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])).run()}\n")
    mine = sorted(name for name in sys.modules if name.split(".")[0] in ("trellis", "flwr", "torch"))
    sys.stdout.write(f"{json.dumps(mine)}\n")
