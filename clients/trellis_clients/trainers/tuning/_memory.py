"""What a step keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that ``forward`` keeps for a backward pass, each storage once, the model's own left out."""
    own = {values.untyped_storage().data_ptr() for values in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward()  # held while the sum is taken: a storage that is freed may be given out again
        total = sum(kept.values())
    del out
    return total
