"""Build the three images and run a fleet from them: ``make images-check``. Needs an engine; docs/deploy.md says which.

    python docker/check.py [--engine docker] [--compose 'docker compose'] [--base IMAGE] [--keep]

Without --base the base is made here, of Debian by debootstrap, so that no image registry is needed (then as root).
Where pip of this environment has an index, links or an authority of its own, the builds are given them as secrets.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
VERSION = REVISION = "check"
IMAGES = ("server", "client", "edge")
SELF_MADE = "trellis-check-base:bookworm"
BIND = "127.0.77.1"  # loopback, and in nobody's way
TOOLS = "gcc cc ld make git"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def expect(holds: bool, text: str) -> None:
    """Print what was checked, or end."""
    if not holds:
        raise SystemExit(f"FAILED: {text}")
    say(f"  ok  {text}")


class Engine:
    """docker or podman: what is used here, both spell alike."""

    def __init__(self, command: str, compose: str | None) -> None:
        self.command = shlex.split(command)
        self.podman = Path(self.command[0]).name == "podman"
        self.compose = shlex.split(compose) if compose else self._compose()
        self.environment = {**os.environ, "DOCKER_BUILDKIT": "1"}

    def __call__(self, *arguments: str, check: bool = True) -> str:
        result = subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, env=self.environment, check=False
        )
        if check and result.returncode:
            raise SystemExit(f"{shlex.join([*self.command, *arguments])}:\n{result.stdout}{result.stderr}")
        return result.stdout.strip()

    def run(self, image: str, *command: str, check: bool = True) -> str:
        """Run something in an image other than trellis: read-only, without rights, as a user that nobody knows."""
        hardened = (
            "--rm",
            "--read-only",
            "--tmpfs",
            "/tmp",
            "--cap-drop",
            "ALL",
            "--user",
            "54321",
            "--network",
            "none",
        )
        return self("run", *hardened, "--entrypoint", command[0], image, *command[1:], check=check)

    def build(self, image: str, base: str, secrets: list[str]) -> float:
        started = time.monotonic()
        arguments = [
            "build",
            "--network",
            "host",
            "--file",
            str(ROOT / "docker/Dockerfile"),
            "--target",
            image,
            *secrets,
        ]
        if self.podman:
            arguments += ["--format", "docker"]  # the OCI format has no health checks
        settings = {"BASE": base, "VERSION": VERSION, "REVISION": REVISION} | ({"TORCH_INDEX": ""} if secrets else {})
        for key, value in settings.items():
            arguments += ["--build-arg", f"{key}={value}"]
        command = ["nice", *self.command, *arguments, "--tag", f"trellis-{image}:{VERSION}", str(ROOT)]
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False)
        if result.returncode:
            raise SystemExit(f"{image} does not build:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
        return time.monotonic() - started

    def _compose(self) -> list[str]:
        for command in ([*self.command, "compose"], ["docker-compose"], ["podman-compose"]):
            fits = command[0] == self.command[0] or command[0].startswith(Path(self.command[0]).name)
            if (
                fits
                and shutil.which(command[0])
                and not subprocess.run([*command, "version"], capture_output=True).returncode
            ):
                return command
        raise SystemExit("no compose command found; say which with --compose")


def bootstrapped(engine: Engine) -> str:
    """Make a base image of Debian with Python 3.11, or use the one made before."""
    if engine("images", "--quiet", SELF_MADE):
        return SELF_MADE
    say("making the base image by debootstrap")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        root = Path(folder) / "root"
        root.mkdir()
        root.chmod(0o755)  # it becomes the image's /, which everybody has to enter
        packages = "--include=ca-certificates,python3.11-venv,python3-distutils"
        command = ["nice", "debootstrap", "--variant=minbase", packages, "bookworm", str(root)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise SystemExit(f"{shlex.join(command)}:\n{made.stdout[-2000:]}{made.stderr[-2000:]}")
        left = (
            "./proc/*",
            "./sys/*",
            "./var/cache/apt/*.bin",
            "./var/cache/apt/archives/*.deb",
            "./var/lib/apt/lists/*",
        )
        archive = Path(folder) / "base.tar"
        subprocess.run(["tar", "-C", root, *(f"--exclude={each}" for each in left), "-cf", archive, "."], check=True)
        engine("import", str(archive), SELF_MADE)
    return SELF_MADE


@contextmanager
def pip_secrets(folder: Path) -> Iterator[list[str]]:
    """Yield the build's arguments that let pip in it find what pip finds here; local folders are served meanwhile."""
    said = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    options: dict[str, str] = {}
    for line in said.splitlines():
        name, _, value = line.partition("=")
        options[name.rpartition(".")[2]] = value.strip("'")
    servers: list[ThreadingHTTPServer] = []

    def reachable(place: str) -> str:
        path = unquote(urlsplit(place).path) if place.startswith("file:") else place
        if "://" in path:
            return path
        # An index links to files beside itself, ../../files, so what is served is the folder around it.
        folder, name = os.path.split(path.rstrip("/"))
        handler = partial(Quiet, directory=folder)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/{name}/"

    lines = ["[global]", "timeout = 180"]
    for key in ("index-url", "extra-index-url", "find-links"):
        if key in options:
            lines.append(f"{key} = {' '.join(map(reachable, options[key].split()))}")
    arguments = []
    if "cert" in options:
        lines.append("cert = /run/secrets/ca")
        arguments += ["--secret", f"id=ca,src={options['cert']}"]
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    try:
        yield [*arguments, "--secret", f"id=pip,src={folder / 'pip.conf'}"] if len(lines) > 2 else []
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def inspect(engine: Engine) -> dict[str, dict[str, float]]:
    """Check what is in the images, and return their sizes in megabytes."""
    sizes = {}
    for image in IMAGES:
        tag = f"trellis-{image}:{VERSION}"
        found = json.loads(engine("image", "inspect", tag))[0]
        config, size = found["Config"], found["Size"] / 1e6
        expect(config["User"] == "10001:0", f"{image}: user {config['User']}")
        labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
        wanted = {"title": f"trellis-{image}", "version": VERSION, "revision": REVISION}
        expect(wanted.items() <= labels.items() and bool(labels["base.name"]), f"{image}: labels {labels}")
        check = config.get("Healthcheck") or found.get("Healthcheck") or found.get("HealthCheck")
        expect(bool(check and "health.py" in str(check)), f"{image}: health check")
        tools = engine.run(
            tag, "sh", "-c", f"command -v {TOOLS}; ls -d /opt/pip /src /opt/trellis/bin/pip* 2>/dev/null", check=False
        )
        expect(tools == "", f"{image}: none of {TOOLS}, and nothing of the build {tools}")
        place = engine.run(tag, "python", "-c", "import tempfile; print(tempfile.gettempdir())")
        expect(place == "/var/lib/trellis", f"{image}: temporary files lie on the volume")
        installed = float(engine.run(tag, "du", "-sm", "/opt/trellis").split()[0])
        said = engine.run(tag, "trellis", "--help")
        expect("Usage" in said, f"{image}: trellis starts on a read-only root as a user without a name")
        sizes[image] = {"image_mb": round(size), "installed_mb": installed}
    libraries = engine.run(f"trellis-edge:{VERSION}", "ls", "/opt/trellis/lib/python3.11/site-packages").split()
    expect(not {"torch", "flwr", "ray"} & set(libraries) and "onnxruntime" in libraries, "edge: neither torch nor flwr")
    for kind in ("installed_mb", "image_mb"):
        share = sizes["edge"][kind] / sizes["client"][kind]
        say(f"  edge over client, {kind}: {sizes['edge'][kind]:g} / {sizes['client'][kind]:g} = {share:.3f}")
    expect(sizes["edge"]["installed_mb"] <= sizes["client"]["installed_mb"] / 5, "edge: installed in a fifth of client")
    return sizes


class Fleet:
    """The compose file's services, under a name of their own."""

    def __init__(
        self, engine: Engine, folder: Path, rounds: int, user: str | None = None, file: str = "compose.yaml"
    ) -> None:
        self.engine, self.name = engine, f"trellis-check-{os.getpid()}"
        files = [ROOT / "docker" / file]
        if user is not None:
            services = yaml.safe_load(files[0].read_text())["services"]
            (folder / "user.yaml").write_text(
                yaml.safe_dump({"services": {name: {"user": user} for name in services if name != "prometheus"}})
            )
            files.append(folder / "user.yaml")
        self.command = [*engine.compose, "-p", self.name, *(part for file in files for part in ("-f", str(file)))]
        self.environment = {
            **engine.environment, "TRELLIS_VERSION": VERSION, "TRELLIS_BIND": BIND, "TRELLIS_HOSTS": BIND,
            "TRELLIS_ROUNDS": str(rounds),
        }  # fmt: skip

    def __call__(self, *arguments: str, wait: bool = True) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*self.command, *arguments],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if wait:
            text = process.communicate()[0]
            if process.returncode:
                raise SystemExit(f"{shlex.join(process.args)}:\n{text[-3000:]}\n{self.logs()}")  # type: ignore[arg-type]
        return process

    def container(self, service: str) -> str:
        names = self.engine("ps", "--all", "--format", "{{.Names}}").splitlines()
        return next(name for name in names if name in (f"{self.name}_{service}_1", f"{self.name}-{service}-1"))

    def state(self, service: str) -> dict[str, object]:
        try:
            found = json.loads(self.engine("inspect", self.container(service)))[0]["State"]
        except StopIteration:
            return {}
        said = found.get("Health") or found.get("Healthcheck") or {}
        return {"status": found["Status"], "exit": found["ExitCode"], "health": said.get("Status", "")}

    def started(self, service: str) -> str:
        """Return when a service's container was started last."""
        return str(json.loads(self.engine("inspect", self.container(service)))[0]["State"]["StartedAt"])

    def until(self, text: str, holds: Callable[[], bool], seconds: float) -> float:
        started = time.monotonic()
        while not holds():
            if time.monotonic() - started > seconds:
                raise SystemExit(f"FAILED: {text} within {seconds:g} s\n{self.logs()}")
            time.sleep(0.5)
        took = time.monotonic() - started
        say(f"  ok  {text} ({took:.1f} s)")
        return took

    def healthy(self, *services: str) -> bool:
        if self.engine.podman:  # its checks run by systemd's timers, which need not be there
            running = all(self.state(each).get("status") == "running" for each in services)
            return running and all(self._well(each) for each in services)
        return all(self.state(each).get("health") == "healthy" for each in services)

    def _well(self, service: str) -> bool:
        command = [*self.engine.command, "healthcheck", "run", self.container(service)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def ended(self, *services: str) -> bool:
        return all(self.state(each).get("status") == "exited" and self.state(each)["exit"] == 0 for each in services)

    def logs(self, service: str | None = None, most: int = 2500) -> str:
        known = ["credentials", "server", "client-1", "client-2", "export", "edge-1", "edge-2"]
        services = [service] if service else known
        text = ""
        for each in services:
            try:
                name = self.container(each)
            except StopIteration:
                continue
            result = subprocess.run([*self.engine.command, "logs", name], capture_output=True, text=True, check=False)
            text += f"--- {each}\n{(result.stdout + result.stderr)[-most:]}\n"
        return text

    def events(self, service: str) -> list[dict[str, object]]:
        """Return what a service logged, a JSON object a line; what it prints goes another way."""
        command = [*self.engine.command, "logs", self.container(service)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return [json.loads(line) for line in log.splitlines()]

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds in the run's metrics, as they stand there."""
        show = "find /var/lib/trellis/runs -name metrics.jsonl -exec cat {} +"
        volumes = ("run", "--rm", "--volumes-from", self.container("server"), "--entrypoint", "sh")
        found = self.engine(*volumes, f"trellis-edge:{VERSION}", "-c", show, check=False)
        return [json.loads(line)["round"] for line in found.splitlines()]


def infer(address: str, side: int = 8) -> float:
    """Ask an edge for the labels of 64 real digits as an outside client would, and return how many are right."""
    import numpy as np
    import tritonclient.grpc as triton
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, targets = digits.images[-64:, None], digits.target[-64:]
    pixels = np.kron(images * (255 / 16), np.ones((1, 1, side // 8, side // 8))).round().astype(np.uint8)
    with triton.InferenceServerClient(address) as client:
        given = triton.InferInput("x", list(pixels.shape), "UINT8")
        given.set_data_from_numpy(pixels)
        labels = client.infer("model", [given]).as_numpy("labels")
    return float(np.mean([label.decode() == str(target) for label, target in zip(labels, targets, strict=True)]))


@contextmanager
def outsider(fleet: Fleet) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Put a node from outside in client-2's place, as docs/deploy.md says; yield its process, and what it says."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name, "log")  # a pipe that nobody reads is full after some hundred rounds, and stops the node
        process = replaced(fleet, Path(name), log)
        try:
            yield process, log
        finally:
            process.kill()
            process.wait()


def replaced(fleet: Fleet, folder: Path, log: Path) -> subprocess.Popen[str]:
    """Shut client-2 out, let camera-7 in, and start it on this machine."""
    credentials = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "trellis", "credentials")
    nodes = ("--nodes", "/credentials/server/nodes.yaml")
    fleet("stop", "client-2")
    fleet(*credentials, "token", "client-2", *nodes, "--revoke")
    token = [*fleet.command, *credentials, "token", "camera-7", *nodes, "--client", "1"]
    said = subprocess.run(token, env=fleet.environment, text=True, capture_output=True, check=True).stdout
    (folder / "token").write_text(said.splitlines()[-1])
    (folder / "ca.pem").write_text(fleet.engine("exec", fleet.container("server"), "cat", "/credentials/ca.pem"))
    trellis = shutil.which("trellis", path=str(Path(sys.executable).parent)) or "trellis"
    command = [trellis, "join", f"{BIND}:7443", "--ca", "ca.pem", "--token-file", "token", "--state", "camera-7"]
    with log.open("w") as said:
        return subprocess.Popen(command, cwd=folder, text=True, stdout=said, stderr=subprocess.STDOUT)


def again(fleet: Fleet, services: tuple[str, ...], options: tuple[str, ...]) -> None:
    """Bring a fleet up once more whose run is complete: server and clients hear so and end, and edges serve on."""
    before = {each: fleet.started(each) for each in services}
    up = fleet("up", "--detach", "--no-build", *options, wait=False)
    fleet.until("all were started again", lambda: all(fleet.started(each) != before[each] for each in services), 60)
    fleet.until("they found the run complete and ended with status 0", partial(fleet.ended, *services, "export"), 300)
    fleet.until("both edges are healthy", partial(fleet.healthy, "edge-1", "edge-2"), 60)
    up.wait()


def scenario(fleet: Fleet, rounds: int, faults: bool) -> None:
    """Bring the fleet up by one command, disturb it where asked, and see that it does what it is for."""
    up, stack, outside = fleet("up", "--detach", "--no-build", wait=False), ExitStack(), None
    trained: tuple[str, ...] = ("server", "client-1", "client-2")
    options: tuple[str, ...] = ()
    try:
        fleet.until("the server is healthy", partial(fleet.healthy, "server"), 90)
        if faults:
            fleet.until("a round is done", lambda: len(fleet.rounds()) > 1, 120)
            fleet.engine("kill", "--signal", "KILL", fleet.container("server"))
            fleet.engine("start", fleet.container("server"))
            fleet.until("the server is back after kill -9", partial(fleet.healthy, "server"), 60)
            fleet.engine("restart", "--time", "40", fleet.container("client-1"))
            fleet.until("client-1 is back after a restart", partial(fleet.healthy, "client-1"), 60)
            outside = stack.enter_context(outsider(fleet))
            fleet.until("a node from outside has joined", lambda: '"camera-7"' in fleet.logs("server", 10**7), 90)
            trained, options = trained[:2], ("--scale", "client-2=0")
            expect(len(fleet.rounds()) < rounds, "all that in mid-run")
            up.kill()  # some compose commands give up on a service that was killed; a second one goes on
            up = fleet("up", "--detach", "--no-build", *options, wait=False)
        ended = partial(fleet.ended, *trained)
        fleet.until("the run is complete: server and clients ended with status 0", ended, 400 + 2 * rounds)
        expect(fleet.rounds() == list(range(rounds + 1)), f"every round of {rounds} is in the metrics, and once")
        logged = [each["round"] for each in fleet.events("server") if each["event"] == "round"]
        expect(set(logged) == set(range(rounds + 1)), "every round is in the server's log, whose lines are all JSON")
        if outside is not None:
            node, log = outside
            well = node.wait(60) == 0 and "the run is over" in log.read_text()
            expect(well, "the node from outside ended with status 0")
        fleet.until("the model is exported", partial(fleet.ended, "export"), 120)
        fleet.until("both edges are healthy", partial(fleet.healthy, "edge-1", "edge-2"), 60)
        for edge, port in (("edge-1", 8001), ("edge-2", 8011)):
            right = infer(f"{BIND}:{port}")
            expect(right > 0.5, f"{edge} answers an outside client: {right:.0%} of 64 digits are right")
        fleet.engine("restart", "--time", "15", fleet.container("edge-2"))
        fleet.until("edge-2 is back after a restart", partial(fleet.healthy, "edge-2"), 60)
        expect(infer(f"{BIND}:8011") > 0.5, "edge-2 answers again")
        again(fleet, trained, options)
        fleet.engine("stop", "--time", "15", fleet.container("edge-1"))
        expect(fleet.ended("edge-1"), "edge-1 ends with status 0 on SIGTERM")
    finally:
        stack.close()
        up.kill()
        up.wait()
        subprocess.run([*fleet.command, "down", "--volumes"], env=fleet.environment, capture_output=True, check=False)


def adaptation(fleet: Fleet) -> None:
    """Bring up the fleet whose devices join; ask them, and see that the cloud changes what they serve."""
    up = fleet("up", "--detach", "--no-build", wait=False)
    try:
        edges = {"edge-1": 8001, "edge-2": 8011}
        fleet.until("both edges are healthy: they have the cloud's model", partial(fleet.healthy, *edges), 180)

        def over() -> bool:
            for port in edges.values():
                infer(f"{BIND}:{port}", side=16)
            return fleet.ended("server")

        fleet.until("the run is complete, while the edges answer", over, 180)
        for edge, port in edges.items():
            show = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8002/metrics').read().decode())"
            page = fleet.engine("exec", fleet.container(edge), "python", "-c", show)
            said = next(line for line in page.splitlines() if line.startswith("trellis_edge_model_info{"))
            expect('affine_version="0"' not in said, f"{edge} serves what the cloud sent: {said}")
            right = infer(f"{BIND}:{port}", side=16)
            expect(right > 0.5, f"{edge} still answers: {right:.0%} of 64 digits are right")
    finally:
        up.kill()
        up.wait()
        subprocess.run([*fleet.command, "down", "--volumes"], env=fleet.environment, capture_output=True, check=False)


def build(engine: Engine, base: str, folder: Path) -> None:
    """Build all images."""
    with pip_secrets(folder) as secrets:
        for image in IMAGES:
            say(f"building {image}")
            say(f"  ok  {engine.build(image, base, secrets):.0f} s")


def main() -> None:
    """Run everything; the first thing that does not hold ends it."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--engine", default="docker", help="docker, podman, or another command of their kind")
    top.add_argument("--compose", help="e.g. 'docker compose', docker-compose, podman-compose; found if not given")
    top.add_argument("--base", help="base image with python3.11 and venv; made by debootstrap if not given")
    top.add_argument("--rounds", type=int, default=600, help="of the run that is disturbed; on a fast machine more")
    top.add_argument("--built", action="store_true", help="images tagged :check are there; build none")
    top.add_argument("--keep", action="store_true", help="keep the images")
    given = top.parse_args()
    engine = Engine(given.engine, given.compose)
    say(f"engine: {engine('--version')}; compose: {shlex.join(engine.compose)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not given.built:
            build(engine, given.base or bootstrapped(engine), folder)
        sizes = inspect(engine)
        say("a fleet of two rounds, every container under a user that no image knows")
        scenario(Fleet(engine, folder, 2, user="54321"), 2, faults=False)
        say("a fleet of two devices that the cloud adapts")
        adaptation(Fleet(engine, folder, 3, file="adapt/compose.yaml"))
        say("a fleet whose server is killed and whose nodes are restarted")
        scenario(Fleet(engine, folder, given.rounds), given.rounds, faults=True)
    if not given.keep:
        engine("rmi", *(f"trellis-{image}:{VERSION}" for image in IMAGES))
    say(f"all well: {json.dumps(sizes)}")


if __name__ == "__main__":
    main()
