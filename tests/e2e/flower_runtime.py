"""A Flower of one's own: home, ports and processes apart from any other on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from contextlib import suppress
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
        api, control = free_ports()
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
        return subprocess.run(
            [
                *("flwr", "run", str(app), "local", "--stream"),
                *("--federation-config", federation, "--run-config", config),
            ],
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
        """Ask the SuperLink to stop, as a person would; return the processes that outlive it."""
        before = self.processes()
        for process in before:
            if "flower-superlink" in " ".join(process.cmdline()):
                process.terminate()
        return list(psutil.wait_procs(before, timeout=30)[1])


def free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]
