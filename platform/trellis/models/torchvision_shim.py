"""Let torchvision be imported beside a torch it was not compiled for.

timm imports torchvision. torchvision's wheel is compiled against one build of torch; beside another (the wheel for
CUDA beside a CPU torch, say) its compiled part does not load, and its import then fails although only Python code
is wanted::

    RuntimeError: operator torchvision::nms does not exist

because it describes the operators ``torchvision::nms`` and ``torchvision::qnms`` to the compiler without their being
declared. Declaring their schemas is enough. The operators themselves stay without code: calling one raises
``NotImplementedError``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# torch forgets what a library declared when the library object goes.
_declared: list[torch.library.Library] = []


def make_importable() -> bool:
    """Import torchvision, declaring its two operators first if it cannot be imported otherwise.

    Returns:
        Whether torchvision can be imported now; False if it is not installed.

    Raises:
        RuntimeError: torchvision cannot be imported for another reason.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _declared:
            raise
        _forget("torchvision")
        _declare()
        importlib.import_module("torchvision")
    return True


def _declare() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)


def _forget(package: str) -> None:
    """Drop the modules that a failed import left behind, so that the next import runs them again."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
