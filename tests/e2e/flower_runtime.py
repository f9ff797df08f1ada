"""A Flower of one's own: home, ports and processes apart from any other on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

MARK = "TRELLIS_MARK"

APP = Path(__file__).parents[2] / "scenarios" / "flower-app"


def marked(mark: str) -> list[psutil.Process]:
    """Return the living processes that were started under a mark.

    Detached ones have lost their parents but not their environment; Ray's workers write their titles over their
    environment but have kept their parents.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                for each in (process, *process.children(recursive=True)):
                    found[each.pid] = each
    return [process for process in found.values() if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class Flower:
    """Runs ``flwr`` commands; their environment carries a mark by which all their processes are known."""

    def __init__(self, home: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.home = home
        home.mkdir()
        (home / "config.toml").write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
        api, control = free_ports(2)
        self.env = {
            **os.environ,
            MARK: self.mark,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(api),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        }

    def run(self, app: Path, nodes: int, config: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run an app on simulated nodes of one CPU each, and return when Flower's log of it has ended."""
        federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
        return self._run(app, "local", ("--federation-config", federation, "--run-config", config), timeout)

    def deploy(self, nodes: int) -> None:
        """Start a SuperLink and SuperNodes on loopback, each a process, as docs/flower.md has it for real machines."""
        (port, *others) = free_ports(nodes + 1)
        address = f"127.0.0.1:{port}"
        with (self.home / "config.toml").open("a") as file:
            file.write(f'[superlink.mine]\naddress = "{address}"\ninsecure = true\n')
        self._start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        until_listening(port)
        for number, own in enumerate(others):
            self._start(
                "flower-supernode", "--insecure", "--superlink", address, "--host", "127.0.0.1", "--port", str(own),
                "--node-config", f"partition-id={number} num-partitions={nodes}",
            )  # fmt: skip

    def run_deployed(self, app: Path, config: str, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run an app on the nodes of ``deploy``, and return when Flower's log of it has ended."""
        return self._run(app, "mine", ("--run-config", config), timeout)

    def _start(self, *command: str) -> None:
        with (self.home / f"{command[0]}.log").open("a") as log:
            subprocess.Popen(command, env=self.env, cwd=self.home, stdout=log, stderr=log)

    def _run(self, app: Path, link: str, options: tuple[str, ...], timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["flwr", "run", str(app), link, "--stream", *options],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def processes(self) -> list[psutil.Process]:
        """Return what lives of it."""
        return marked(self.mark)

    def stop(self) -> list[psutil.Process]:
        """Ask SuperLink and SuperNodes to stop, as a person would; return the processes that outlive them."""
        before = self.processes()
        for process in before:
            with suppress(psutil.Error):
                if any(name in " ".join(process.cmdline()) for name in ("flower-superlink", "flower-supernode")):
                    process.terminate()
        return list(psutil.wait_procs(before, timeout=30)[1])


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until_listening(port: int, seconds: float = 120.0) -> None:
    """Wait until somebody takes connections on a port of loopback."""
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        assert time.monotonic() < end, f"nobody listens on port {port}"
        time.sleep(0.2)
