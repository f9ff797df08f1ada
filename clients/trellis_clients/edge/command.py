"""``trellis edge``: serve a model on a device. ``python -m trellis_clients.edge`` is the same, and loads less."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from trellis.errors import DataError, PluginError, TrellisError

if TYPE_CHECKING:
    from trellis_clients.edge.server import EdgeServer

DESCRIPTION = """\
Serve an exported model over the Open Inference Protocol (gRPC). When it listens, one line of JSON says where.
SIGTERM and SIGINT end it after what is being answered. A new MODEL, or MODEL's name with .affine.npz, put in place by
renaming, is taken in while it serves.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    top = argparse.ArgumentParser(prog="trellis edge", description="Run a model on a device, without torch.")
    commands = top.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve", help="answer inference requests", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    serve.add_argument("model", type=Path, metavar="MODEL.onnx", help="from `trellis export`")
    serve.add_argument("--name", help="under which clients ask for it (default: the file's name)")
    serve.add_argument("--address", default="127.0.0.1:8001", help="host:port or unix:/path (default: %(default)s)")
    serve.add_argument(
        "--metrics-address", default="127.0.0.1:8002", help="host:port for Prometheus, or 'off' (default: %(default)s)"
    )
    serve.add_argument("--threads", type=int, default=1, help="of ONNX Runtime (default: %(default)s)")
    serve.add_argument("--batch", type=int, default=64, help="largest batch (default: %(default)s)")
    serve.add_argument("--queue", type=int, default=16, help="batches that may wait (default: %(default)s)")
    serve.add_argument("--request-seconds", type=float, default=30.0, help="longest wait (default: %(default)s)")
    serve.add_argument("--request-bytes", type=int, help="longest request (default: what the largest batch takes)")
    serve.add_argument("--grace", type=float, default=10.0, help="seconds to end in on SIGTERM (default: %(default)s)")
    serve.add_argument("--no-reflection", action="store_true", help="do not tell tools the protocol")
    serve.add_argument("--watch", type=float, default=1.0, help="seconds between looks at the files; 0: never look")

    adapt = serve.add_argument_group("adaptation")
    adapt.add_argument("--adapter", default="none", help="none, prediction-bn, t3a, lame, foa (default: %(default)s)")
    adapt.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the adapter")
    adapt.add_argument(
        "--source", type=Path, metavar="CLEAN.npz", help="array 'x' of clean inputs, where one is needed"
    )

    keep = serve.add_argument_group("state and uploads")
    keep.add_argument("--state", type=Path, metavar="DIR", help="keep adaptation and uploads over restarts")
    keep.add_argument("--save-seconds", type=float, default=5.0, help="between saves (default: %(default)s)")
    keep.add_argument("--uploads", action="store_true", help="queue samples for the cloud, as CEMA selects them")
    keep.add_argument("--upload-items", type=int, default=1024, help="most that wait (default: %(default)s)")
    keep.add_argument("--upload-mb", type=float, default=64.0, help="most megabytes that wait (default: %(default)s)")
    keep.add_argument("--drop", choices=("oldest", "newest"), default="oldest", help="when full (default: %(default)s)")
    keep.add_argument(
        "--e-max", type=float, default=0.4, help="unreliable from here on, in ln C (default: %(default)s)"
    )
    keep.add_argument("--e-min", type=float, default=0.02, help="certain up to here, in ln C (default: %(default)s)")
    keep.add_argument("--bytes-per-hour", type=float, help="budget of uploads (default: none)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status. An error that a user can mend is one line."""
    given = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return serve(given)
    except ModuleNotFoundError as error:
        found: TrellisError = PluginError(
            "app-missing", f"{error.name!r} is not installed: pip install '.[edge]' in a checkout"
        )
    except TrellisError as error:
        found = error
    sys.stderr.write(f"error: {found}\n")
    return found.exit_status


def serve(given: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    started = time.perf_counter()
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = build(given)
    server.start()
    live = server.runtime.live
    line = {
        "serving": live.model.name,
        "address": server.where,
        "metrics": server.metrics_where,
        "adapter": live.adapter.name,
        "version": live.version,
        "seconds": round(time.perf_counter() - started, 3),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    stop.wait()
    server.stop(given.grace)
    return 0


def build(given: argparse.Namespace) -> EdgeServer:
    """Return the server that the options describe, not started."""
    from trellis_clients.edge import loading
    from trellis_clients.edge.housekeeping import Housekeeper
    from trellis_clients.edge.runtime import Runtime, Selection, Settings
    from trellis_clients.edge.server import Address, EdgeServer
    from trellis_clients.edge.uploads import UploadBuffer

    def load(path: Path) -> Any:
        return loading.load(path, name=given.name or given.model.stem, threads=given.threads)

    for key in ("request_seconds", "save_seconds", "watch", "grace", "upload_mb"):
        if not 0 <= getattr(given, key) < 1e9 or (getattr(given, key) == 0 and key not in ("watch", "grace")):
            raise TrellisError("edge-setting", f"--{key.replace('_', '-')}={getattr(given, key)}: out of range")
    model = load(given.model)
    settings = Settings(
        adapter=given.adapter,
        options=dict(map(option, given.set)),
        source=loading.source(given.source, model.predictor.shape) if given.source else None,
        selection=Selection(given.e_max, given.e_min, bytes_per_hour=given.bytes_per_hour) if given.uploads else None,
        queue=given.queue,
        batch=given.batch,
    )
    uploads = None
    if given.uploads:
        folder = given.state / "uploads" if given.state else None
        uploads = UploadBuffer(given.upload_items, int(given.upload_mb * 1e6), given.drop, folder)
    runtime = Runtime(model, settings, uploads, given.state)
    keeper = Housekeeper(
        runtime, given.model, given.model.with_suffix(".affine.npz"), load, every=given.watch, save=given.save_seconds
    )
    address = Address(
        given.address,
        None if given.metrics_address == "off" else given.metrics_address,
        given.request_bytes,
        given.request_seconds,
        not given.no_reflection,
    )
    return EdgeServer(runtime, address, keeper)


def option(text: str) -> tuple[str, Any]:
    """Return key and value of ``KEY=VALUE``; values as JSON has them, or text.

    Raises:
        DataError: there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise DataError("adapter-option", f"--set {text!r} is not KEY=VALUE, e.g. --set supports=20")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
