"""What deploy/ says about commands, settings, files and metrics is true of the code."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from headrace.bench.demo.scenario import DELAY_S, DEVICE_UNCUT_MS, PHASES
from headrace.bench.doctor import examine_server
from headrace.bench.links.process import main as link_main
from headrace.bench.material import main as material_main
from headrace.bench.server.null_engine import NullEngine
from headrace.cli import app
from headrace.edge.access import Access
from headrace.edge.config import EdgeSettings
from headrace.edge.metrics import Metrics as EdgeMetrics
from headrace.server.config import ServerSettings
from headrace.server.daemon import Server
from headrace.server.metrics import Metrics as ServerMetrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SETTINGS = {"edge": EdgeSettings, "serve": ServerSettings}


def commands() -> set[str]:
    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def assert_flags_exist(command: str, words: list[str]) -> None:
    assert command in commands()
    known = {"--config"} | {"--" + name.replace("_", "-") for name in SETTINGS[command].model_fields}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


def flags(words: list[str]) -> dict[str, str]:
    return dict(word.lstrip("-").split("=", 1) for word in words if word.startswith("--"))


def test_compose_runs_the_demo() -> None:
    services = COMPOSE["services"]
    assert services.keys() == {"secrets", "server", "link", "material", "edge"}
    for service in services.values():
        assert set(service.get("depends_on", {})) <= services.keys()
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).is_file()
    assert services["server"]["image"] == services["link"]["image"] == services["material"]["image"]
    assert_flags_exist(services["server"]["command"][0], services["server"]["command"][1:])
    assert_flags_exist("edge", services["edge"]["command"])


def test_compose_has_the_link_and_the_device_of_the_demo() -> None:
    link = flags(COMPOSE["services"]["link"]["command"])
    assert link["phases"] == ",".join(f"{p.mbps:g}:{p.seconds:g}" for p in PHASES)
    assert float(link["delay-ms"]) == DELAY_S * 1000
    assert flags(COMPOSE["services"]["edge"]["command"])["device-uncut-ms"] == f"{DEVICE_UNCUT_MS:g}"
    entry = COMPOSE["services"]["link"]["entrypoint"]
    assert entry == ["python", "-m", link_main.__module__]
    with pytest.raises(SystemExit) as ended:
        link_main(["--help"])
    assert ended.value.code == 0


def test_compose_makes_what_the_edge_looks_at(tmp_path) -> None:
    (script,) = COMPOSE["services"]["material"]["command"]
    first, second = (shlex.split(part) for part in script.split("&&"))
    assert first[:3] == ["python", "-m", material_main.__module__]
    assert second[0] == "headrace"
    assert second[1] in commands()
    assert material_main([str(tmp_path)]) == 0
    sources = [
        word.partition("=")[2] for word in COMPOSE["services"]["edge"]["command"] if word.startswith("--source=")
    ]
    assert len(sources) == 2
    for source in sources:
        assert (tmp_path / Path(source).relative_to(first[3])).exists()
    assert material_main([]) == 2


def make_secrets(folder: Path) -> None:
    """Run what the service `secrets` runs, with `folder` for its volume."""
    (script,) = COMPOSE["services"]["secrets"]["command"]
    script = script.replace("/make-certificates.sh", str(DEPLOY / "make-certificates.sh"))
    script = script.replace("/secrets", str(folder)).replace(
        "headrace token", f"{sys.executable} -m headrace.cli token"
    )
    subprocess.run(["sh", "-ec", script], check=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl, which makes the certificates")
async def test_the_secrets_of_compose_open_a_server_that_runs_as_compose_runs_it(tmp_path) -> None:
    make_secrets(tmp_path)
    token = (tmp_path / "token").read_text()
    make_secrets(tmp_path)
    assert (tmp_path / "token").read_text() == token, "kept when it is run again"
    given = {
        name.replace("-", "_"): value.replace("/secrets", str(tmp_path))
        for side in ("server", "edge")
        for name, value in flags(COMPOSE["services"][side]["command"]).items()
    }
    settings = ServerSettings.load(
        host="0.0.0.0", **{k: given[k] for k in ("tls_cert", "tls_key", "tokens")}, cache_dir=tmp_path, port=0
    )
    server = Server(settings, lambda _: NullEngine())
    await server.start()
    try:
        server_address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
        edge = {k: given[k] for k in ("tls_ca", "tls_server_name", "token_file")}
        finding = await asyncio.to_thread(
            examine_server, server_address, Access.of(EdgeSettings.load(server=server_address, **edge))
        )
        assert finding.level == "ok"
        assert "by TLS, its certificate is good for 39" in finding.what
        (tmp_path / "token").write_text(token.replace("_", "_x", 1))
        wrong = Access.of(EdgeSettings.load(server=server_address, **edge))
        assert "refuses the token" in (await asyncio.to_thread(examine_server, server_address, wrong)).what
        edge.pop("tls_server_name")
        stranger = Access.of(EdgeSettings.load(server=server_address, **edge))
        assert (await asyncio.to_thread(examine_server, server_address, stranger)).level == "fault"
    finally:
        await server.close()


def test_kubernetes_runs_a_server_that_would_start() -> None:
    documents = {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    pod = documents["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert_flags_exist(container["args"][0], container["args"][1:])
    given = {name.replace("-", "_"): value for name, value in flags(container["args"]).items()}
    dockerfile = (DEPLOY / "Dockerfile.server").read_text()
    environment = dict(re.findall(r"HEADRACE_SERVER_(\w+)=(\S+)", dockerfile))
    settings = ServerSettings.load(**given, **{k.lower(): v for k, v in environment.items()})
    assert not settings.insecure
    assert pod["spec"]["enableServiceLinks"] is False, "or the Service's name sets HEADRACE_SERVER_PORT to its URL"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in (settings.tls_cert, settings.tls_key, settings.tokens):
        assert any(path.is_relative_to(mount) for mount in mounts)
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}
    assert pod["spec"]["terminationGracePeriodSeconds"] > settings.drain_s
    labels = pod["metadata"]["labels"].items()
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert documents[kind]["spec"]["selector"]["matchLabels"].items() <= labels
    assert documents["Service"]["spec"]["selector"].items() <= labels
    (sysctl,) = pod["spec"]["securityContext"]["sysctls"]
    assert {sysctl["name"]: int(sysctl["value"])} == COMPOSE["services"]["server"]["sysctls"]


def test_front_ends_on_ray_are_started_with_flags_that_exist_and_time_to_drain() -> None:
    documents = {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / "ray.yaml").read_text())}
    pod = documents["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["sh", "-c"] and pod["enableServiceLinks"] is False
    join, serve = (part.split() for part in container["args"][0].split("&&"))
    # Ray's programs talk to a node on their own host: a front end joins the cluster, with room for no replica.
    cluster = documents["RayCluster"]
    address = f"--address={cluster['metadata']['name']}-head-svc:6379"
    assert join[:2] == ["ray", "start"] and {address, "--num-cpus=0"} < {*join}
    assert serve[:2] == ["exec", "headrace"]
    command, *words = serve[2:]
    assert_flags_exist(command, words)
    given = flags(words)
    settings = ServerSettings.load(**{name.replace("-", "_"): value for name, value in given.items()})
    assert settings.engine == "ray"
    assert pod["terminationGracePeriodSeconds"] > settings.drain_s + 5
    assert settings.ray_address == "auto"
    (worker,) = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    of_front, of_worker = ({m["mountPath"] for m in c["volumeMounts"]} for c in (container, worker))
    assert of_worker == {str(settings.bundle_dir)} < of_front, "replicas look for bundles where front ends do"
    for path in (settings.tls_cert, settings.tls_key, settings.tokens):
        assert str(path.parent) in of_front
    assert {p["containerPort"] for p in container["ports"]} == {settings.port, 9100}
    allowed = {d["metadata"]["name"]: d for d in policies()}
    assert allowed.keys() == {"headrace", "headrace-ray"}, "Ray's ports are on front ends, too"
    labels = {
        d["spec"]["template"]["metadata"]["labels"]["app"] for d in documents.values() if d["kind"] == "StatefulSet"
    }
    assert documents["Service"]["spec"]["selector"] == {"app": labels.pop()}


def policies() -> list[dict[str, Any]]:
    documents = yaml.safe_load_all((DEPLOY / "ray.yaml").read_text())
    return [d for d in documents if d["kind"] == "NetworkPolicy"]


@pytest.mark.parametrize("side", ["edge", "server"])
def test_dockerfiles_copy_the_whole_package(side) -> None:
    text = (DEPLOY / f"Dockerfile.{side}").read_text()
    copied = {word for line in re.findall(r"^COPY (?!--)(.*)$", text, re.M) for word in line.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    # A folder is copied with the packages below it.
    assert {name.removeprefix("headrace.").split(".")[0] for name in packages} - {"headrace"} <= copied
    assert {path.name for path in ROOT.glob("*.py")} <= copied
    for name in re.findall(r"\b(HEADRACE_\w+)=", text):
        prefix = {"SERVER": ServerSettings, "EDGE": EdgeSettings}[name.split("_")[1]]
        assert name.split("_", 2)[2].lower() in prefix.model_fields


def test_the_edges_image_has_no_torch() -> None:
    text = (DEPLOY / "Dockerfile.edge").read_text()
    assert "[server" not in text
    assert all(
        "--no-deps" in line for line in text.splitlines() if line.rstrip().endswith(("compressai", "compressai \\"))
    )


@pytest.mark.parametrize("side", ["edge", "server"])
def test_units_start_commands_that_exist(side) -> None:
    text = (DEPLOY / f"headrace-{side}.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    program, command, *rest = line.split()
    assert Path(program).name == "headrace"
    assert_flags_exist(command, rest)
    (patience,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert float(patience) > ServerSettings.load().drain_s
    # Files of root's that nobody else may read are handed over; what the comment names lies where they then are.
    handed = set(re.findall(r"^LoadCredential=([\w.]+):", text, re.M))
    named = set(re.findall(rf"/run/credentials/headrace-{side}\.service/([\w.]+)", text))
    assert handed == named
    assert not re.search(r'^#.*= "/etc/headrace/\S+\.(pem|key)"', text, re.M)


def test_the_kernel_setting_is_the_one_that_compose_sets() -> None:
    lines = (DEPLOY / "90-headrace.conf").read_text().splitlines()
    (setting,) = [line for line in lines if line and not line.startswith("#")]
    name, value = (part.strip() for part in setting.split("="))
    assert Path("/proc/sys", *name.split(".")).exists()
    for side in ("server", "edge"):
        assert {k: str(v) for k, v in COMPOSE["services"][side]["sysctls"].items()} == {name: value}


def test_rules_use_metrics_that_are_served() -> None:
    rules = yaml.safe_load((DEPLOY / "headrace-rules.yaml").read_text())["groups"][0]["rules"]
    served = {
        sample.name
        for metrics in (EdgeMetrics(), ServerMetrics())
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    used = {name for rule in rules for name in re.findall(r"\bheadrace_\w+", rule["expr"])}
    assert used
    assert used <= served
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert {name for rule in rules for name in re.findall(r"\bheadrace:[\w:]+", rule["expr"])} <= recorded
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    assert all((DEPLOY / name).is_file() for name in scraped["rule_files"])
