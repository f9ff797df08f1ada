"""The commands of a deployment: serve, join, certs, token."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from trellis.errors import PluginError, TrellisError

Root = Annotated[Path, typer.Option("--runs", help="folder of all runs", envvar="TRELLIS_RUNS")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="override, e.g. --set trainer.lr=0.1", metavar="KEY=VALUE")
]
TOKEN = "TRELLIS_TOKEN"
STATE = Path("node")


def serve(
    file: Annotated[Path | None, typer.Argument(help="scenario file", show_default=False)] = None,
    address: Annotated[str, typer.Option(help="host:port to listen on")] = "127.0.0.1:7443",
    certs: Annotated[
        Path | None, typer.Option(help="folder with server.pem and server.key, e.g. from `trellis certs`")
    ] = None,
    mutual_tls: Annotated[bool, typer.Option("--mutual-tls", help="nodes must show a certificate of ca.pem")] = False,
    nodes: Annotated[Path | None, typer.Option(help="allow-list; read again whenever it changes")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain text, anybody may join; loopback only")] = False,
    insecure_beyond_loopback: Annotated[bool, typer.Option("--insecure-beyond-loopback", hidden=True)] = False,
    min_clients: Annotated[
        int | None, typer.Option(help="rounds start once this many are there; all if not given")
    ] = None,
    compression: Annotated[str, typer.Option(help="of payloads to nodes: none, zstd")] = "none",
    updates: Annotated[str, typer.Option(help="lossy shortening of updates: none, float16, int8")] = "none",
    leave_after: Annotated[float, typer.Option(help="seconds after which a lost node fails its task")] = 90.0,
    give_up_after: Annotated[float, typer.Option(help="seconds without any node after which the run stops")] = 300.0,
    max_payload_mb: Annotated[int, typer.Option(help="largest payload taken or sent")] = 2000,
    metrics_address: Annotated[str | None, typer.Option(help="host:port of Prometheus metrics")] = None,
    set_: Set = None,
    resume: Annotated[str | None, typer.Option(help="continue a run: its folder, name/time, or 'latest'")] = None,
    runs: Root = Path("runs"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print only where the report is")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object a line")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="log as JSON, one object a line, to stderr")] = False,
) -> None:
    """Run a scenario on nodes that join over gRPC: Flower's strategies here, the clients there."""
    with needing("train,deploy"):
        from trellis import cli, scenario
        from trellis.deploy import announcing, logs, serving
        from trellis.deploy.metrics import ServerMetrics
        from trellis.runs import Run, resolve

    if (file is None) == (resume is None):
        raise TrellisError("usage", "give either a scenario file or --resume RUN")
    logs.configure(log_json, role="server")
    settings = serving.link_settings(
        address,
        certificate=certs / "server.pem" if certs else None,
        key=certs / "server.key" if certs else None,
        authority=certs / "ca.pem" if certs and mutual_tls else None,
        nodes=nodes,
        insecure=insecure,
        beyond_loopback=insecure_beyond_loopback,
        leave_after_s=leave_after,
        give_up_after_s=give_up_after,
        max_payload_bytes=max_payload_mb * 1_000_000,
        uploads_bytes=max(max_payload_mb * 1_000_000 // 2, 100_000_000),
    )
    if file is not None:
        current = Run.create(runs, scenario.load(file, set_ or []))
    else:
        assert resume is not None
        if set_:
            raise TrellisError("usage", "--set cannot be used with --resume: a resumed run is the run it was")
        current = Run.open(resolve(resume, runs))
        scenario.check(current.scenario)
    metrics = ServerMetrics(metrics_address)
    settings = replace(settings, folder=current.path)  # what is too large to wait in memory waits beside the run
    options = serving.Options(settings, min_clients, compression, updates, clients=current.scenario.clients)
    name = f"{current.path.parent.name}/{current.path.name}"
    announcer: announcing.Announcer = announcing.Logged(name)
    if not log_json:
        console = cli.err if json_ or quiet else cli.out
        announcer = announcing.Spoken(
            address,
            announcing.join_options(not insecure, nodes is not None, mutual_tls and not insecure),
            announcing.names_of(certs / "server.pem") if certs and not insecure else [],
            lambda text: console.print(text, markup=False),
        )
    _stop_on_sigterm()
    grids = serving.grids(options, name, announcer.listening, metrics.count, announcer, metrics.watch)

    def on_round(cell: str, line: Mapping[str, Any]) -> None:
        announcer.round(cell, line)
        metrics.round(cell, line)

    raise typer.Exit(cli.execute(current, quiet, json_, grids, on_round, command="serve"))


def join(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="host:port of the server", show_default=False)],
    node: Annotated[str, typer.Option(help="this node's name; by default its host's and its --state's")] = "",
    node_config: Annotated[
        str, typer.Option(help="e.g. 'client=3' and changes for this node: 'client=3 data.path=/data/mine.npz'")
    ] = "",
    state: Annotated[Path, typer.Option(help="folder for what this node keeps over restarts")] = STATE,
    ca: Annotated[Path | None, typer.Option(help="certificate authority of the server, PEM")] = None,
    cert: Annotated[
        Path | None, typer.Option(help="this node's certificate, PEM; its key lies beside it as .key")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help=f"file with this node's token; else ${TOKEN}")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain text; loopback only")] = False,
    insecure_beyond_loopback: Annotated[bool, typer.Option("--insecure-beyond-loopback", hidden=True)] = False,
    compression: Annotated[str, typer.Option(help="of answers: none, zstd")] = "none",
    allow_code: Annotated[
        list[str] | None,
        typer.Option(help="sha256:… of a plug-in file that the scenario may name here; see docs/deploy.md"),
    ] = None,
    code: Annotated[Path | None, typer.Option(help="folder with the plug-in files that are allowed")] = None,
    edge: Annotated[bool, typer.Option("--edge", help="be a device without torch: serve a model, see docs/edge.md")] = (
        False
    ),
    model: Annotated[
        Path | None, typer.Option(help="with --edge: the exported source model; else the cloud sends it")
    ] = None,
    serve_at: Annotated[
        str, typer.Option("--serve", help="with --edge: host:port for inference requests")
    ] = "127.0.0.1:8001",
    threads: Annotated[int, typer.Option(help="with --edge: of ONNX Runtime")] = 1,
    give_up_after: Annotated[float | None, typer.Option(help="seconds without the server after which it ends")] = None,
    grace: Annotated[float, typer.Option(help="seconds that SIGTERM leaves for the task under way")] = 10.0,
    stopped_status: Annotated[
        int, typer.Option(help="exit status of a node that was told to stop before the run was over")
    ] = 0,
    metrics_address: Annotated[str | None, typer.Option(help="host:port of Prometheus metrics")] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="log as JSON, one object a line, to stderr")] = False,
) -> None:
    """Be a client of a deployed scenario: train on this machine when the server asks, or serve a model (--edge)."""
    from trellis.deploy.stopping import Stopping

    stopping = Stopping(stopped_status, grace)  # before anything heavy
    context.call_on_close(stopping.restore)
    wanted = ("edge",) if edge else ("train,deploy", "a device without torch joins with --edge")
    with needing(*wanted):
        from trellis.deploy import joining, logs

    logs.configure(log_json, role="node")
    where = joining.Where(
        address,
        ca=ca,
        certificate=cert,
        token=joining.token(token_file, os.environ.get(TOKEN)),
        insecure=insecure,
        beyond_loopback=insecure_beyond_loopback,
    )
    if edge:
        if allow_code or code:
            raise TrellisError("usage", "--allow-code and --code are for nodes that train; a device runs no plug-ins")
        with needing(*wanted):
            side = _app("edge-node")
        reason = side.run(
            where,
            stopping,
            node=node,
            config=joining.node_config(node_config),
            state=joining.private(state),
            compression=compression,
            model=model,
            serve=serve_at,
            threads=threads,
            give_up_after_s=give_up_after,
            metrics_address=metrics_address,
        )
        _leave(reason, stopped_status)
    if model is not None:
        raise TrellisError("usage", "--model is for devices: give --edge too")
    with needing(*wanted):
        side = _app("node")
    reason = side.run(
        where,
        stopping,
        node=node,
        config=joining.node_config(node_config),
        state=joining.private(state),
        compression=compression,
        allowed=allow_code or [],
        code=code,
        give_up_after_s=give_up_after,
        metrics_address=metrics_address,
    )
    _leave(reason, stopped_status)


def _leave(reason: str, stopped_status: int) -> NoReturn:
    """Say the server's last word, or that there was none, and end."""
    sys.stdout.write(f"{reason or 'stopped'}\n")
    raise typer.Exit(0 if reason else stopped_status)


def _app(side: str) -> Any:
    """Return the module of a node's side, without importing a library that a device does not have."""
    from importlib.metadata import entry_points

    for entry in entry_points(group="trellis.apps", name=side):
        return entry.load()
    raise PluginError("app-missing", f"no installed package has the app {side!r}: install Trellis with its clients")


@contextmanager
def needing(extras: str, otherwise: str = "") -> Iterator[None]:
    """Say in one line which of the project's extras bring a library that an import does not find.

    Args:
        extras: as pip takes them, e.g. ``train,deploy``.
        otherwise: what a user may have meant instead.

    Raises:
        PluginError: in place of ``ModuleNotFoundError``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0].startswith("trellis"):
            raise
        hint = f"; {otherwise}" if otherwise else ""
        raise PluginError(
            "app-missing",
            f"{error.name!r} is not installed: pip install '.[{extras}]' in a checkout of Trellis{hint}",
        ) from None


def certs(
    folder: Annotated[Path, typer.Argument(help="where the files go", show_default=False)],
    host: Annotated[list[str] | None, typer.Option(help="name or address of the server, as nodes call it")] = None,
    node: Annotated[list[str] | None, typer.Option(help="also a client certificate for this node")] = None,
    days: Annotated[int, typer.Option(help="until they expire")] = 365,
) -> None:
    """Write a development authority, the server's certificate, and one for each node named; keep what is there."""
    with needing("train,deploy"):
        from trellis.wire import certificates

    written = certificates.write(folder, host or [], node or [], days)
    said = f"new certificates and keys of {', '.join(written)}" if written else "all else is kept; --host makes it anew"
    sys.stdout.write(f"{folder}: ca.pem for the nodes; {said}\n")


def token(
    node: Annotated[str, typer.Argument(help="the node's name", show_default=False)],
    nodes: Annotated[Path, typer.Option(help="allow-list; made if it is not there")] = Path("nodes.yaml"),
    client: Annotated[int | None, typer.Option(help="which client of the federation it is")] = None,
    expires: Annotated[str | None, typer.Option(help="last day, YYYY-MM-DD")] = None,
    cert: Annotated[
        Path | None, typer.Option(help="certificate that the node will show under --mutual-tls, PEM")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="write the token here, for your eyes only; else it is printed")] = (
        None
    ),
    revoke: Annotated[bool, typer.Option("--revoke", help="shut the node out, at once")] = False,
) -> None:
    """Let a node in: hand out its new token, once, and put the token's digest on the allow-list.

    Of a node that is on the list what is not given stays as it was.
    """
    with needing("train,deploy"):
        from trellis.deploy import allowing

    if revoke:
        allowing.revoke(nodes, node)
        sys.stdout.write(f"{node} is revoked; a running server shuts it out within a second\n")
        return
    if to is None:
        sys.stdout.write(f"{allowing.admit(nodes, node, client, expires, cert)}\n")
        return
    with allowing.private_file(to) as file:  # before the list: a token that cannot be kept must not replace another
        file.write(f"{allowing.admit(nodes, node, client, expires, cert)}\n")
    sys.stdout.write(f"{to}: the token of {node}\n")


def _stop_on_sigterm() -> None:
    """End on SIGTERM as on Ctrl-C: the round under way is given up, the folder resumes from the one before."""

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (serve, join, certs, token):
        app.command()(command)
