"""What can be known of images, compose files and manifests without an engine; ``make images-check`` runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import jsonschema
import pytest
import typer
import yaml
from grpc_health.v1 import health, health_pb2_grpc

from trellis import cli, scenario
from trellis.deploy import announcing
from trellis.wire import certificates
from trellis.wire.nodes import AllowList, digest
from trellis_clients.edge.command import parser as edge_parser

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
IMAGES = ("server", "client", "edge")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
ADAPT = yaml.safe_load((DOCKER / "adapt" / "compose.yaml").read_text())
GPU = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
MANIFESTS = [
    each
    for path in sorted((DOCKER / "kubernetes").glob("*.yaml"))
    for each in yaml.safe_load_all(path.read_text())
]  # fmt: skip
PODS = {each["metadata"]["name"]: each["spec"]["template"] for each in MANIFESTS if "template" in each.get("spec", {})}
TREE = re.compile(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", re.MULTILINE | re.DOTALL)
STAGES = {name: (base, body) for base, name, body in TREE.findall(DOCKERFILE)}
HEALTH = DOCKER / "health.py"


def lineage(stage: str) -> str:
    """Return the instructions of a stage and of those it is made from."""
    base, body = STAGES[stage]
    return (lineage(base) if base in STAGES else "") + body


def parse(arguments: list[str]) -> None:
    """Let the command line read arguments, as in a container, without running them."""
    if arguments[0] == "edge":
        edge_parser().parse_args(arguments[1:])
        return
    command = typer.main.get_command(cli.app).commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context(arguments[0], list(arguments[1:]))


def arguments(entrypoint: list[str], command: list[str]) -> list[str] | None:
    """Return what trellis is called with, None where it is not."""
    if entrypoint == ["serve-or-resume"]:
        split = command.index("--")
        return ["serve", *command[:split], *command[split + 1 :]]
    return list(command) if entrypoint == ["trellis"] else None


def command_and_entrypoint(service: dict[str, Any]) -> list[str]:
    return [*service.get("entrypoint", []), *service.get("command", [])]


def command_of(name: str, fleet: dict[str, Any]) -> list[str]:
    """Return what a service's container is given: by its file, else by its image."""
    service = fleet["services"][name]
    default = re.search(r"^CMD (\[.*?\])$", lineage(service.get("build", {}).get("target", "runtime")), re.M | re.S)
    return service.get("command") or (json.loads(default[1].replace("\\\n", "")) if default else [])


# -- images ---------------------------------------------------------------------------------------------------------


def test_dockerfile_keeps_hadolints_rules():
    tool = Path(sys.executable).parent / "hadolint"
    result = subprocess.run([tool, "--format", "json", DOCKER / "Dockerfile"], capture_output=True, text=True, cwd="/")
    assert json.loads(result.stdout) == [], result.stderr
    # The tool finds something where there is something.
    bad = subprocess.run(
        [tool, "-"], input="FROM debian:latest\nRUN cd /tmp\n", capture_output=True, text=True, cwd="/"
    )
    assert "DL3007" in bad.stdout and "DL3003" in bad.stdout


def test_bases_are_pinned_by_digest():
    assert re.search(r"^ARG BASE=\S+:\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert len(STAGES) == DOCKERFILE.count("\nFROM ")
    assert {base for base, _ in STAGES.values()} - set(STAGES) == {"${BASE}"}
    assert "# syntax=" not in DOCKERFILE  # a frontend from a registry is one more thing that is not pinned


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_not_root_has_a_health_check_labels_and_nothing_of_the_build(image):
    text = lineage(image)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["10001:0"]
    assert text.index("USER") > text.rindex("RUN")
    assert (
        len(re.findall(r"^HEALTHCHECK .*\\\n +CMD \[\"python\", \"/usr/local/lib/trellis/health.py\"\]$", text, re.M))
        == 1
    )
    named = ("title", "description", "version", "revision", "licenses", "documentation", "source", "base.name")
    assert sorted(re.findall(r"org\.opencontainers\.image\.([a-z.]+)=\S", text)) == sorted((*named, "vendor"))
    assert urlsplit(re.search(r'image\.documentation="(.+?)"', text)[1]).scheme
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^ARG (BASE|VERSION|REVISION|SOURCE)(.*)$", STAGES["runtime"][1], re.M) == [
        ("BASE", ""), ("VERSION", f"={version}"), ("REVISION", "=unknown"), ("SOURCE", "="),
    ]  # fmt: skip
    assert not re.findall(r"\b(pip|apt-get|apt|curl|wget|git|gcc|ADD)\b", text)
    assert re.findall(r"COPY --from=(\S+) (\S+)", text) == [(f"build-{image}", "/opt/trellis")]
    assert "VOLUME /var/lib/trellis" in text and "HOME=/var/lib/trellis" in text
    assert re.findall(r"TMPDIR=(\S+)", text) == ["/var/lib/trellis"]  # a volume; /tmp is memory
    assert "FLWR_TELEMETRY_ENABLED=0" in text and "RAY_USAGE_STATS_ENABLED=0" in text


def test_the_edge_is_built_without_the_stage_that_has_torch():
    assert "torch" not in lineage("build-edge") and "torch" in lineage("build-client")
    extras = {image: re.findall(r"requirements\.py ([a-z ]+) >", lineage(f"build-{image}")) for image in IMAGES}
    assert extras == {"server": ["train deploy", "export"], "client": ["train deploy"], "edge": ["edge"]}


def test_requirements_are_those_of_the_extras():
    def printed(*extras: str) -> list[str]:
        return subprocess.check_output([sys.executable, DOCKER / "requirements.py", *extras], text=True).splitlines()

    edge = printed("edge")
    assert any(line.startswith("onnxruntime>=") for line in edge) and any(line.startswith("numpy>=") for line in edge)
    assert not [line for line in edge if line.startswith(("torch", "flwr", "ray"))]
    assert any(line.startswith("torch>=") for line in printed("train", "deploy"))


def ignored(path: str) -> bool:
    """Is a path left out of the build context? The last line that fits decides; a folder's verdict holds inside it."""
    verdict, parts = False, path.split("/")
    inside = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            names = parts if pattern.startswith("**/") else [at for at in inside if at.count("/") == pattern.count("/")]
            if any(fnmatch(name, pattern.removeprefix("**/")) for name in names):
                verdict = not line.startswith("!")
    return verdict


def test_the_build_context_holds_what_is_copied_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    built = [*wheel["packages"], *wheel.get("force-include", {}), project["project"]["readme"], "LICENSE"]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
        if source != "."
    ]
    assert copied
    for source in (*copied, *built, "platform/trellis/cli.py"):
        assert (ROOT / source).exists() and not ignored(source), source
    private = (".git/config", ".venv/bin/python", "runs/x/scenario.yaml", "certs/ca.key", "nodes.yaml")
    for outside in (*private, "tests/conftest.py", "docker/compose.yaml", "platform/trellis/__pycache__/cli.pyc"):
        assert ignored(outside), outside


# -- compose --------------------------------------------------------------------------------------------------------


def merged() -> dict[str, Any]:
    """Return the services with the GPU file over them, as compose merges mappings."""

    def over(base: Any, more: Any) -> Any:
        if isinstance(base, dict) and isinstance(more, dict):
            return {**base, **{key: over(base.get(key), value) for key, value in more.items()}}
        return more

    return over(COMPOSE, GPU)["services"]  # type: ignore[no-any-return]


def test_the_two_fleets_share_nothing_that_compose_keeps():
    """Compose names what it keeps by the file's folder, unless a name stands there."""
    kept = {}
    for folder, fleet in ((DOCKER, COMPOSE), (DOCKER / "adapt", ADAPT)):
        assert "name" not in fleet and not [each for each in fleet["services"].values() if "container_name" in each]
        assert not [name for name, how in fleet["volumes"].items() if how]
        kept[folder.name] = {f"{folder.name}_{each}" for each in (*fleet["volumes"], *fleet["services"], "default")}
    assert len(kept) == 2 and not set.intersection(*kept.values())


def test_what_fails_is_not_started_again_for_ever():
    for name, service in (*COMPOSE["services"].items(), *ADAPT["services"].items()):
        serves = name.startswith(("edge-", "prometheus"))  # is there to answer, whatever happened
        assert service.get("restart", "no") in (
            ("unless-stopped",) if serves else ("no", "on-failure:3", "on-failure:10")
        )
    assert {COMPOSE["services"][each]["restart"] for each in ("client-1", "client-2")} == {"on-failure:3"}
    assert COMPOSE["services"]["server"]["restart"] == ADAPT["services"]["server"]["restart"] == "on-failure:10"


@pytest.mark.parametrize("fleet", [COMPOSE, ADAPT], ids=["compose", "adapt"])
def test_a_fleet_says_which_version_and_revision_it_builds(fleet):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for service in fleet["services"].values():
        if "build" in service:
            assert service["build"]["args"] == {
                "VERSION": f"${{TRELLIS_VERSION:-{version}}}",
                "REVISION": "${TRELLIS_REVISION:-unknown}",
                "SOURCE": "${TRELLIS_SOURCE:-}",
            }
            assert service["image"].endswith(f":${{TRELLIS_VERSION:-{version}}}")


FLEETS = {"compose": COMPOSE["services"], "gpu": merged(), "adapt": ADAPT["services"]}
SERVICES = [pytest.param(each, id=f"{fleet}-{name}") for fleet, named in FLEETS.items() for name, each in named.items()]


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml", "adapt/compose.yaml"])
def test_compose_files_fit_the_compose_specification(file):
    schema = json.loads(Path(__file__).with_name("compose-spec.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    given = yaml.safe_load((DOCKER / file).read_text())
    assert [error.message for error in validator.iter_errors(given)] == []
    next(iter(given["services"].values()))["read-only"] = True
    assert list(validator.iter_errors(given))


def test_the_fleet_is_what_it_says():
    services = COMPOSE["services"]
    assert set(services) == {
        "credentials",
        "server",
        "client-1",
        "client-2",
        "export",
        "edge-1",
        "edge-2",
        "prometheus",
    }
    assert services["prometheus"]["profiles"] == ["metrics"]
    assert not [name for name, each in services.items() if "profiles" in each and name != "prometheus"]
    for name in services:
        for needed, how in services[name].get("depends_on", {}).items():
            assert how["condition"] == "service_completed_successfully" and "restart" not in services["export"]
            assert needed in ("credentials", "server", "export")
    for name in ("client-1", "client-2"):
        gpu = merged()[name]
        assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
        assert gpu["build"]["target"] == "client" and gpu["build"]["args"]["TORCH_INDEX"] == ""
        assert [each for each in gpu["command"] if each not in services[name]["command"]] == [
            "--node-config=runtime.device=cuda"
        ]


@pytest.mark.battery("F10")
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_hardened(service):
    assert service["read_only"] and any(each.startswith("/tmp") for each in service["tmpfs"])
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and not service.get("privileged")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not str(service.get("user", "10001")).startswith("0")
    tag = service["image"].replace("${TRELLIS_VERSION:-0.1.0}", "0.1.0")
    assert ":latest" not in tag and re.search(r":v?\d+\.\d+", tag)
    if "build" in service:
        assert service["build"]["target"] in IMAGES and service["image"].startswith(
            f"trellis-{service['build']['target']}:"
        )
        assert service["build"]["dockerfile"] == "docker/Dockerfile"
        assert service["build"]["context"] == ("../.." if service in ADAPT["services"].values() else "..")
    else:
        assert re.search(r"@sha256:[0-9a-f]{64}$", service["image"])
    for port in service.get("ports", []):
        assert port.startswith(("127.0.0.1:", "${TRELLIS_BIND:-127.0.0.1}:"))
    folder, fleet = (DOCKER / "adapt", ADAPT) if service in ADAPT["services"].values() else (DOCKER, COMPOSE)
    for mount in service["volumes"]:
        source = mount.split(":")[0]
        if source.startswith("."):
            assert mount.endswith(":ro") and (folder / source).is_file()
        else:
            assert source in fleet["volumes"]
    held = [mount.split(":")[1] for mount in service["volumes"]]
    if "build" in service and any(each in ("join", "serve-or-resume") for each in command_and_entrypoint(service)):
        assert "/var/lib/trellis" in held  # where TMPDIR is


@pytest.mark.parametrize("fleet", [COMPOSE, ADAPT], ids=["compose", "adapt"])
def test_a_node_sees_its_own_credentials_only(fleet):
    holders: dict[str, set[str]] = {}
    for name, service in fleet["services"].items():
        for mount in service["volumes"]:
            if "credentials" in mount.split(":")[0] and not mount.startswith("."):
                assert name == "credentials" or mount.endswith(":ro")
                holders.setdefault(mount.split(":")[0], set()).add(name)
    nodes = fleet["services"]["credentials"]["entrypoint"][2:]
    assert len(nodes) == 2 and nodes == [name for name in fleet["services"] if "server:7443" in command_of(name, fleet)]
    assert holders == {f"{name}-credentials": {"credentials", name} for name in ("server", *nodes)}
    folders = re.search(r"for each in (.+); do", STAGES["server"][1])
    assert folders and set(nodes) < set(folders[1].split())


@pytest.mark.parametrize("service", SERVICES)
def test_the_command_line_takes_what_compose_gives(service):
    given = arguments(service.get("entrypoint", ["trellis"]), command_of("it", {"services": {"it": service}}))
    if "build" not in service or given is None:
        assert "prometheus" in service["image"] or service["entrypoint"][:2] == ["sh", "/credentials.sh"]
        return
    parse([re.sub(r"\$\{TRELLIS_ROUNDS:-(\d+)\}", r"\1", each) for each in given])


def test_prometheus_asks_the_ports_that_answer():
    said = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    targets = {each for job in said["scrape_configs"] for config in job["static_configs"] for each in config["targets"]}
    assert targets == {"server:9100", "client-1:9100", "client-2:9100", "edge-1:8002", "edge-2:8002"}
    for name in ("server", "client-1", "client-2"):
        assert "--metrics-address=0.0.0.0:9100" in COMPOSE["services"][name]["command"]


@pytest.mark.parametrize("file", ["scenario.yaml", "adapt/scenario.yaml"])
def test_a_fleets_scenario_has_as_many_clients_as_the_fleet(file):
    loaded = scenario.load(DOCKER / file, ["rounds.count=2"])
    scenario.check(loaded)
    assert loaded.clients == 2


# -- kubernetes -----------------------------------------------------------------------------------------------------


def test_manifests_are_complete_and_refer_to_each_other():
    kinds = sorted((each["kind"], each["metadata"]["name"]) for each in MANIFESTS)
    assert kinds == sorted(set(kinds)) and all(each["apiVersion"] for each in MANIFESTS)
    for each in MANIFESTS:
        if each["kind"] == "Service":
            template = PODS[each["metadata"]["name"].removesuffix("-metrics")]
            assert each["spec"]["selector"].items() <= template["metadata"]["labels"].items()
            ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports
    claims = {each["metadata"]["name"] for each in MANIFESTS if each["kind"] == "PersistentVolumeClaim"}
    claimed = {
        volume["persistentVolumeClaim"]["claimName"]
        for template in PODS.values()
        for volume in template["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claimed == claims
    for path in (DOCKER / "kubernetes").glob("*.yaml"):
        assert not re.search(r"(: |- )[&*]\w|<<:", path.read_text()), "anchors are not plain"


def test_a_service_that_may_be_exposed_shows_the_link_alone():
    services = {each["metadata"]["name"]: each["spec"] for each in MANIFESTS if each["kind"] == "Service"}
    of_server = {
        name: {port["port"] for port in each["ports"]}
        for name, each in services.items()
        if each["selector"] == {"app.kubernetes.io/name": "trellis-server"}
    }
    assert of_server == {"trellis-server": {7443}, "trellis-server-metrics": {9100}}
    assert services["trellis-server-metrics"]["type"] == "ClusterIP"


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_hardened_and_its_command_is_one(name):
    spec = PODS[name]["spec"]
    assert not spec["automountServiceAccountToken"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"]
    image, _, tag = container["image"].partition(":")
    assert image.removeprefix("trellis-") in IMAGES and re.fullmatch(r"\d+\.\d+\.\d+", tag)
    assert name == "trellis-export" or {"startupProbe"} < {key for key in container if key.endswith("Probe")}
    template = {each["metadata"]["name"] for each in next(
        (m for m in MANIFESTS if m["kind"] == "StatefulSet" and m["metadata"]["name"] == name), {"spec": {}}
    )["spec"].get("volumeClaimTemplates", [])}  # fmt: skip
    volumes = {each["name"] for each in spec["volumes"]} | template
    assert {each["name"] for each in container["volumeMounts"]} == volumes
    assert {"/tmp", "/var/lib/trellis"} <= {each["mountPath"] for each in container["volumeMounts"]}
    given = arguments(container.get("command", ["trellis"]), container.get("args", []))
    if given:
        parse(given)


# -- what runs in them ----------------------------------------------------------------------------------------------


CLEAN = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
PROXY = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "grpc", "all")}
"""Nobody listens there."""


def ask(url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HEALTH, url], capture_output=True, text=True, env={**CLEAN, **environment}, timeout=60
    )


@pytest.fixture
def asked(tmp_path):
    """A gRPC server with the health service, in plain text and with TLS; yields both ports and the service."""
    certificates.write(tmp_path, ["localhost"])
    server, service = grpc.server(ThreadPoolExecutor(2)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    key, chain = (tmp_path / "server.key").read_bytes(), (tmp_path / "server.pem").read_bytes()
    plain = server.add_insecure_port("127.0.0.1:0")
    secure = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, chain)]))
    server.start()
    yield plain, secure, service, str(tmp_path / "ca.pem")
    server.stop(None).wait()


def test_the_health_check_asks_the_health_service(asked, tmp_path):
    plain, secure, service, ca = asked
    well = [ask(f"grpc://127.0.0.1:{plain}"), ask(f"grpcs://localhost:{secure}", TRELLIS_HEALTH_CA=ca)]
    well += [
        ask(f"grpc://127.0.0.1:{plain}", **PROXY),
        ask(f"grpcs://localhost:{secure}", TRELLIS_HEALTH_CA=ca, **PROXY),
    ]
    assert [(each.returncode, each.stderr) for each in well] == [(0, "")] * 4
    certificates.write(tmp_path / "other", ["localhost"])
    other = ask(f"grpcs://localhost:{secure}", TRELLIS_HEALTH_CA=str(tmp_path / "other" / "ca.pem"))
    assert other.returncode == 1 and "UNAVAILABLE" in other.stderr
    service.enter_graceful_shutdown()
    ending = ask(f"grpc://127.0.0.1:{plain}")
    assert ending.returncode == 1 and "not SERVING" in ending.stderr


def test_the_health_check_of_a_process_that_has_only_metrics():
    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert ask(f"{url}/metrics").returncode == 0
    assert ask(f"{url}/metrics", **PROXY).returncode == 0
    assert ask(f"{url}/nowhere").returncode == 1
    server.shutdown()
    server.server_close()
    gone = ask(f"{url}/metrics")
    assert gone.returncode == 1 and "refused" in gone.stderr
    assert "set TRELLIS_HEALTH" in ask("").stderr


@pytest.mark.battery("F10")
def test_a_server_that_comes_back_resumes(tmp_path):
    """With a command in trellis's place that says how it was called; `make images-check` restarts the real one."""
    (tmp_path / "trellis").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "trellis").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRELLIS_RUNS": str(tmp_path / "runs")}

    def called(*given: str) -> subprocess.CompletedProcess[str]:
        command = [shutil.which("sh"), DOCKER / "serve-or-resume.sh", *given]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    given = ("a scenario.yaml", "--set", "x=[1, 2]", "--", "--address", "h:1")
    assert called(*given).stdout.splitlines() == ["serve", "a scenario.yaml", "--set", "x=[1, 2]", "--address", "h:1"]
    run = tmp_path / "runs" / "fleet" / "20260101-000000"
    run.mkdir(parents=True)
    assert called(*given).stdout.splitlines()[1] == "a scenario.yaml"  # a folder without its scenario is no run
    (run / "scenario.yaml").touch()
    assert called(*given).stdout.splitlines() == ["serve", "--resume", "latest", "--address", "h:1"]
    shutil.rmtree(tmp_path / "runs")
    assert called("scenario.yaml").returncode == 2


def test_credentials_are_made_once_each_nodes_in_its_own_folder(tmp_path):
    folder, work = tmp_path / "credentials", tmp_path / "work"
    for each in (work, *(folder / name for name in ("server", "client-1", "client-2"))):
        each.mkdir(parents=True)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TRELLIS_WORK": str(work),
        "TRELLIS_CREDENTIALS": str(folder),
        "TRELLIS_HOSTS": "cloud.example 10.0.0.1",
    }

    def made() -> dict[str, bytes]:
        subprocess.run(
            ["sh", DOCKER / "credentials.sh", "client-1", "client-2"], env=environment, check=True, timeout=120
        )
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    files = made()
    assert set(files) == {
        "server/ca.pem", "server/server.pem", "server/server.key", "server/nodes.yaml",
        "client-1/ca.pem", "client-1/token", "client-2/ca.pem", "client-2/token",
    }  # fmt: skip
    AllowList(folder / "server" / "nodes.yaml")
    nodes = yaml.safe_load(files["server/nodes.yaml"])["nodes"]
    for number, node in enumerate(("client-1", "client-2")):
        assert nodes[node] == {"client": number, "token": digest(files[f"{node}/token"].strip())}
    assert announcing.names_of(folder / "server" / "server.pem") == [
        "server", "localhost", "cloud.example", "127.0.0.1", "10.0.0.1",
    ]  # fmt: skip
    secret = [*folder.rglob("*.key"), *folder.rglob("token")]
    assert len(secret) == 3 and not [path for path in secret if path.stat().st_mode & 0o077]
    assert list(work.iterdir()) == []  # the authority's key is gone
    assert made() == files
