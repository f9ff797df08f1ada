"""Randomness that depends on nothing but the scenario's seed and a place in the run.

No generator state is carried from round to round, so a resumed run, a run on two workers and an
uninterrupted run on one all draw the same numbers. Libraries that insist on process-wide generators
(Flower samples with ``random``, its privacy noise uses ``numpy.random``, dropout uses torch's) are given
a seeded state for the length of one call and the previous state back afterwards.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random.mtrand import get_bit_generator, set_bit_generator

if TYPE_CHECKING:
    import torch

Part = int | str


def derive(*parts: Part) -> int:
    """Return a 63-bit seed that is a fixed function of ``parts``, e.g. ``derive(seed, "train", 3, 7)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def numpy_generator(*parts: Part) -> np.random.Generator:
    """Return a NumPy generator seeded by ``derive(*parts)``."""
    return np.random.default_rng(derive(*parts))


def torch_generator(*parts: Part) -> torch.Generator:
    """Return a CPU torch generator seeded by ``derive(*parts)``."""
    import torch

    return torch.Generator().manual_seed(derive(*parts))


@contextmanager
def scoped(*parts: Part) -> Iterator[None]:
    """Seed the process-wide generators of Python, NumPy and torch, and restore them on leaving.

    Torch is touched only where it is already imported. On CUDA machines that use the GPU, the current
    device's generator is scoped too.
    """
    seed = derive(*parts)
    torch = sys.modules.get("torch")
    python_state = random.getstate()
    torch_state = torch.get_rng_state() if torch else None
    cuda = torch is not None and torch.cuda.is_initialized()
    cuda_state = torch.cuda.get_rng_state() if torch and cuda else None
    random.seed(seed)
    if torch:
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
    try:
        with _numpy_scoped(seed & 0xFFFFFFFF):
            yield
    finally:
        random.setstate(python_state)
        if torch and torch_state is not None:
            torch.set_rng_state(torch_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state)


_spare: list[np.random.BitGenerator] = []
"""Bit generators to lend to NumPy: making one costs more than all the rest of a scope."""


@contextmanager
def _numpy_scoped(seed: int) -> Iterator[None]:
    """Seed NumPy's process-wide generator for a while.

    NumPy takes 40 microseconds to write a state back. So another bit generator stands in for the one that is
    there; only the second of a pair of Gaussian numbers, if one is waiting, would get lost that way.
    """
    bits = get_bit_generator()
    # Scopes of several threads may leave one another's generator behind. What is to come back must not be lent.
    _spare[:] = [each for each in _spare if each is not bits]
    waiting = _waiting_gaussian(bits)
    lent = _spare.pop() if _spare else np.random.MT19937()
    set_bit_generator(lent)
    np.random.seed(seed)
    try:
        yield
    finally:
        set_bit_generator(bits)
        _spare.append(lent)
        if waiting is not None:
            state: Any = np.random.get_state(legacy=False)
            np.random.set_state({**state, "has_gauss": 1, "gauss": waiting})


_TWISTER_BYTES = 4 * 625
"""What a Mersenne twister is in memory: 624 words and a position."""


def _waiting_gaussian(bits: np.random.BitGenerator) -> float | None:
    """Return the Gaussian number that is waiting in NumPy's process-wide generator, the second of a pair, if any.

    Reading that generator's state takes as long as writing it. Drawing one number tells as much: if it was waiting,
    the bits behind it have not moved; if not, they are put back.
    """
    if type(bits) is not np.random.MT19937:
        state: Any = np.random.get_state(legacy=False)
        return float(state["gauss"]) if state["has_gauss"] else None
    address = bits.ctypes.state_address
    before = ctypes.string_at(address, _TWISTER_BYTES)
    number = np.random.standard_normal()
    if ctypes.string_at(address, _TWISTER_BYTES) == before:
        return float(number)
    ctypes.memmove(address, before, _TWISTER_BYTES)
    return None
