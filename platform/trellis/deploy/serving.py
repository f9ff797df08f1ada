"""The cloud side of a deployment: an experiment whose clients join over gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import grpc

from trellis import experiment, scenario
from trellis.deploy.announcing import Announcer
from trellis.deploy.loopback import is_loopback
from trellis.errors import TrellisError
from trellis.grids.grpc import GrpcGrid, Link, Settings
from trellis.runs import CellFolder
from trellis.scenario import Scenario
from trellis.wire.generated import link_pb2 as pb
from trellis.wire.nodes import AllowList

ENCODINGS = {"none": pb.ENCODING_NONE, "zstd": pb.ENCODING_ZSTD}
SHORTENINGS = {"none": pb.SHORTENING_NONE, "float16": pb.SHORTENING_FLOAT16, "int8": pb.SHORTENING_INT8}
T = TypeVar("T")
MANY = 2**31 - 1
"""Clients of a run that nobody counts any more."""


@dataclass(frozen=True)
class Options:
    """What the operator chose, beyond the scenario.

    Attributes:
        settings: of the link.
        min_clients: a round starts once this many are there; all by default.
        compression: a key of ``ENCODINGS``.
        updates: a key of ``SHORTENINGS``.
        clients: of the scenario, where it says so; a run that is complete waits for as many to tell them.
    """

    settings: Settings
    min_clients: int | None = None
    compression: str = "none"
    updates: str = "none"
    clients: int | None = None


def grids(
    options: Options,
    run: str,
    on_listening: Callable[[int], None] = lambda _: None,
    counted: Callable[[str, Mapping[str, str]], None] = lambda *_: None,
    announcer: Announcer | None = None,
    on_link: Callable[[Link], None] = lambda _: None,
) -> experiment.Grids:
    """Return what ``experiment.execute`` takes to run on nodes that join; one link serves all cells.

    Args:
        options: see there.
        run: its name.
        on_listening: called with the port.
        counted: called with the name of an event and its labels, for metrics.
        announcer: told for whom the first round waits.
        on_link: given the link, once it listens.
    """

    @contextmanager
    def offer(client: ModuleType, cells: Mapping[str, Any]) -> Iterator[experiment.GridFor]:
        sizes = {len(cell.parts) for cell in cells.values()}
        if not sizes:
            _say_goodbye(options, run, on_listening, counted, announcer)
            yield _nothing
            return
        if len(sizes) > 1:
            raise TrellisError(
                "serve-clients", f"the variants have {sorted(sizes)} clients; a deployment has one number of them"
            )
        (num_clients,) = sizes
        settings = replace(options.settings, keep_answers=max(_keep(cells), options.settings.keep_answers))
        sites, folders = client.Sites(cells), dict[str, CellFolder]()
        grid = GrpcGrid(
            num_clients,
            settings,
            run=run,
            min_clients=options.min_clients,
            encoding=_known("compression", options.compression, ENCODINGS),
            shortening=_known("updates", options.updates, SHORTENINGS),
            counted=counted,
        )
        on_link(grid.link)
        on_listening(grid.link.port)

        def grid_for(each: Scenario, _: int, folder: CellFolder) -> tuple[GrpcGrid, Any]:
            folders[folder.name] = folder
            grid.describe(folder.name, scenario.plain(each), folder.seed)
            return grid, sites

        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(grid, announcer, over), name="trellis-waiting", daemon=True)
        watcher.start()
        try:
            yield grid_for
        finally:
            over.set()
            watcher.join()  # it asks the link, which is about to close
            done = folders.keys() == cells.keys() and all(folder.complete for folder in folders.values())
            grid.link.close("the run is over" if done else "the server stopped; the run can be resumed", final=done)

    return offer


def _watch(grid: GrpcGrid, announcer: Announcer | None, over: threading.Event) -> None:
    """Say for how many clients the first round still waits, whenever that changes, until they are all there."""
    before, needed = -1, grid.min_clients
    while announcer is not None and before < needed and not over.is_set():
        if (there := len(grid.link.connected())) != before:
            announcer.waiting(min(there, needed), needed)
            before = there
        with grid.link.changed:
            grid.link.changed.wait(0.2)


def _say_goodbye(
    options: Options,
    run: str,
    on_listening: Callable[[int], None],
    counted: Callable[[str, Mapping[str, str]], None],
    announcer: Announcer | None,
) -> None:
    """Tell the nodes of a run that is complete that it is over: those that were away would try for ever.

    They have as long to come as a lost node has, ``leave_after_s``; when all are there nobody waits on.
    """
    clients, wait = options.clients or MANY, options.settings.leave_after_s
    grid = GrpcGrid(clients, options.settings, run=run, counted=counted)
    try:
        on_listening(grid.link.port)
        if announcer is not None:
            announcer.note(f"the run is complete; nodes that come within {wait:g} s are told so")
        end = time.monotonic() + wait
        while grid.link.call(_streams, grid) < clients and time.monotonic() < end:
            with grid.link.changed:
                grid.link.changed.wait(0.2)
    finally:
        grid.link.close("the run is over")


def _streams(grid: GrpcGrid) -> int:
    """Return how many nodes can be told something: joining comes first, and the stream after it."""
    return sum(node.connected for node in grid.link.nodes.values())


def _nothing(*_: Any) -> Any:
    raise AssertionError("every cell is complete")


def _keep(cells: Mapping[str, Any]) -> int:
    """Return how many answers a node has to keep for a server that goes back to its last checkpoint."""
    every = max(cell.scenario["checkpoint"]["every"] for cell in cells.values())
    return 4 * int(every) + 4


def _known(option: str, value: str, table: Mapping[str, T]) -> T:
    if value not in table:
        raise TrellisError("usage", f"--{option} is {value!r}; there are {', '.join(table)}")
    return table[value]


def link_settings(
    address: str,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    authority: Path | None = None,
    nodes: Path | None = None,
    insecure: bool = False,
    beyond_loopback: bool = False,
    **more: Any,
) -> Settings:
    """Return the link's settings, safe unless told otherwise.

    Args:
        address: host and port.
        certificate, key: of the server, PEM.
        authority: signs nodes' certificates; with it, every node must show one.
        nodes: the allow-list.
        insecure: plain text; and without ``nodes`` anybody may join.
        beyond_loopback: allow that on an address that other machines reach.
        more: further fields of ``Settings``.

    Raises:
        TrellisError: the options leave the link open, or a file cannot be read.
    """
    if insecure and not is_loopback(address) and not beyond_loopback:
        raise TrellisError(
            "serve-insecure",
            f"--insecure on {address} would let everybody on the network read and join; use --certs, or say"
            " --insecure-beyond-loopback too",
        )
    allow = AllowList(nodes) if nodes else None
    if insecure:
        return Settings(address=address, allow=allow, **more)
    if certificate is None or key is None:
        raise TrellisError(
            "serve-no-tls", "no certificate: make one with `trellis certs certs --host HOST` and give --certs certs"
        )
    if allow is None:
        raise TrellisError(
            "serve-no-nodes", "no allow-list: make one with `trellis token NODE --nodes nodes.yaml` and give --nodes"
        )
    credentials = grpc.ssl_server_credentials(
        [(_bytes(key), _bytes(certificate))],
        root_certificates=_bytes(authority) if authority else None,
        require_client_auth=authority is not None,
    )
    return Settings(address=address, credentials=credentials, allow=allow, **more)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrellisError("certs-file", f"{path}: {error.strerror}") from None
