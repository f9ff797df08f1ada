"""Start and stop Ray, and every place where Trellis reaches beneath Ray's public names.

Written for ray 2.55. A Ray that we start is for this process and its workers alone:

- it listens on the loopback interface only. Ray offers no option for that on Linux (it replaces
  ``127.0.0.1`` by the machine's own address), but does it by itself where it takes the platform to be
  unable to form clusters;
- its ports ask for a token made for this process, so other users of the machine cannot send it work;
- replies up to 1 MB come back within the answer to the call, not through the object store. Measured for a
  reply of 100 KB: a third of the CPU time; the two ways meet at about 1.5 MB;
- an object that nobody holds leaves the store at once, not within a second, so that the next can take its place;
- it prints nothing. What workers print is in Ray's own log files under ``/tmp/ray/session_latest/logs``.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import secrets
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from flwr.app import RecordDict

from trellis import flower as _flower  # noqa: F401  (sets Ray's telemetry off before Ray is imported)
from trellis.errors import GridError
from trellis.records import LiveArray, arrays_of

ATTEMPTS = 3
STORE_SHARE = 0.25
STORE_BYTES = 2 * 2**30
INLINE_BYTES = 2**20

log = logging.getLogger(__name__)


def start_ray(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_mb: int | None = None,
) -> bool:
    """Start Ray on this machine, or join the cluster at ``address``; use Ray as it is where it already runs.

    Args:
        address: ``"auto"`` or ``"host:port"`` of a running cluster. None starts a Ray of our own, whatever
            else runs on the machine.
        num_cpus: CPU slots of our own Ray; the machine's cores if None.
        num_gpus: GPUs of our own Ray; all of them if None.
        object_store_mb: size of its object store; a quarter of the memory, at most 2 GB, if None.

    Returns:
        True if this call started or joined Ray, so that its caller owes a ``stop_ray``.

    Raises:
        GridError: Ray is not installed, could not be started in three attempts, or could not be joined.
    """
    try:
        import ray
    except ImportError:
        raise GridError("ray-missing", "Ray is not installed; run: pip install '.[train]' in a checkout") from None
    if ray.is_initialized():
        return False
    _quiet()
    if address is not None:
        _join(address)
        return True
    options = {
        "address": "local",
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "include_dashboard": False,
        "object_store_memory": _store_bytes(object_store_mb),
        "_system_config": {"max_direct_call_object_size": INLINE_BYTES, "free_objects_period_milliseconds": 0},
    }
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with _loopback():
                _init(options)
            return True
        except Exception as error:  # Ray raises a bare Exception when a process is late to register
            log.debug("Ray did not start, attempt %d of %d", attempt, ATTEMPTS, exc_info=True)
            ray.shutdown()
            reason = f"{type(error).__name__}: {error}"
    raise GridError(
        "ray-start",
        f"Ray did not start in {ATTEMPTS} attempts ({reason[:300]}); see /tmp/ray/session_latest/logs, make sure that "
        "/tmp/ray can be written and memory is free, or set runtime.grid to 'local'",
    )


def stop_ray() -> None:
    """Stop the Ray that ``start_ray`` started, or leave the cluster that it joined, which goes on running."""
    import ray

    ray.shutdown()


def give_back_pages(content: RecordDict) -> None:
    """See that the pages of large arrays, read from the object store, are given back when nobody holds them any more.

    The store never does so: once used, its pages stay in memory, for as many replies as ever lay there at once. A
    reply's object is ours alone, and nobody reads it after us; the whole pages of its arrays are punched out of the
    store's file in the moment when the last view of them goes, while the object is still there.
    """
    for _, _, array in arrays_of(content):
        if isinstance(array, LiveArray) and (values := array.view()).nbytes > INLINE_BYTES:
            whole: Any = values
            while isinstance(whole.base, np.ndarray):
                whole = whole.base  # what every view of it holds, and what alone holds the place in the store
            if not whole.flags.owndata:
                weakref.finalize(whole, _punch, whole.__array_interface__["data"][0], whole.nbytes).atexit = False


def _punch(address: int, size: int) -> None:
    page = mmap.PAGESIZE
    start, end = -(-address // page) * page, (address + size) // page * page
    if end > start and (advise := _madvise()):
        advise(start, end - start, mmap.MADV_REMOVE)  # of no effect where the memory is not the store's


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def _join(address: str) -> None:
    try:
        _init({"address": address})
    except Exception as error:
        raise GridError(
            "ray-connect",
            f"runtime.address: no Ray cluster answers at {address!r} ({type(error).__name__}: {str(error)[:200]}); "
            "start one with `ray start --head`, or leave the address out",
        ) from error


def _init(options: dict[str, Any]) -> None:
    import ray

    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a tip about GPUs that is not for users of Trellis
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    if main and callable(handler):
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place of any that was there


def _store_bytes(size_mb: int | None) -> int:
    if size_mb is not None:
        return size_mb * 2**20
    from ray._common.utils import get_system_memory

    return min(int(STORE_SHARE * get_system_memory()), STORE_BYTES)


@contextmanager
def _loopback() -> Iterator[None]:
    """Within this context, a starting Ray takes 127.0.0.1 as its address and asks callers for our token."""
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    Config.initialize("")  # Ray read its environment when it was imported; read it again
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _quiet() -> None:
    """Send what Ray's processes would print on standard output to our log; the dead are reported by the grid."""
    worker = sys.modules["ray._private.worker"]

    def to_log(data: dict[str, Any], ignore_prefix: bool) -> None:  # noqa: ARG001  (Ray's signature)
        log.debug("%s: %s", data.get("pid"), "\n".join(data.get("lines", ())))

    vars(worker)["print_to_stdstream"] = to_log
