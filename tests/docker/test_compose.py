"""The container files agree with configs/containers.yaml, each other, and a real server. Needs no Docker engine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.cli import main
from builder.core.output import Output
from builder.gateway import limits
from builder.llmapi import launch as llmapi_launch
from builder.machine import containers
from builder.recipe import schema
from builder.serving import draining, gateway
from builder.serving.server import ServerOptions, serve
from docs.generate import usage
from tests.serving.test_server import one_model

COMPOSE = yaml.safe_load(Path("docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = Path("Dockerfile").read_text()
DASHBOARD = json.loads(Path("docker/metrics/dashboards/triton.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
OURS = ["build", "eval", "triton", "smoke"]


def test_the_default_base_is_the_newest_image_that_builds_and_serves() -> None:
    image = containers.newest(schema.Engine().tensorrt_llm)
    assert f"\nARG BASE_IMAGE={image.image}\n" in DOCKERFILE
    assert f"\nARG TENSORRT_LLM={image.tensorrt_llm}\n" in DOCKERFILE
    arguments = SERVICES["build"]["build"]["args"]
    assert arguments["BASE_IMAGE"] == f"${{BASE_IMAGE:-{image.image}}}"
    assert arguments["TENSORRT_LLM"] == f"${{TENSORRT_LLM:-{image.tensorrt_llm}}}"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for port in service.get("ports", []):
        assert port.startswith(("127.0.0.1:", "${BIND:-127.0.0.1}:"))
    for volume in service["volumes"]:
        assert isinstance(volume, str) or volume["bind"] == {"create_host_path": False}


@pytest.mark.parametrize("name", OURS)
def test_ours_run_as_the_caller_and_see_the_artifacts_at_one_path(name: str) -> None:
    assert SERVICES[name]["user"] == "${PUID:-1000}:${PGID:-1000}"
    [artifacts] = [v for v in SERVICES[name]["volumes"] if not isinstance(v, str)]
    assert artifacts["target"] == "/artifacts"
    assert artifacts.get("read_only", False) == (name not in ("build", "eval"))


def test_a_gpu_is_asked_for_by_what_needs_one_and_taken_back_for_the_cpu() -> None:
    asking = {name for name, service in SERVICES.items() if "deploy" in service}
    assert asking == {"build", "eval", "triton"}
    for name in asking:
        [device] = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    text = Path("compose.cpu.yml").read_text()
    cpu = yaml.safe_load(text.replace("!reset ", ""))["services"]
    assert set(cpu) == set(OURS)
    for name in asking:
        assert cpu[name]["deploy"] is cpu[name]["ulimits"] is None
    assert text.count("!reset null") == 6


def test_the_commands_in_it_parse() -> None:
    for name in ("triton", "smoke"):
        assert main.parser().parse_args(SERVICES[name]["command"]).run
    for name in ("build", "eval"):
        assert SERVICES[name]["entrypoint"] == ["builder", name]


def test_what_serves_starts_again_and_is_healthy_only_if_it_answers() -> None:
    assert {name for name in SERVICES if "restart" in SERVICES[name]} == {"triton", "prometheus", "grafana"}
    assert {SERVICES[name].get("restart") for name in ("triton", "prometheus", "grafana")} == {"unless-stopped"}
    command, check = SERVICES["triton"]["command"], SERVICES["triton"]["healthcheck"]
    port = command[command.index("--port") + 1]
    assert check["test"] == ["CMD", "python3", "-m", "builder.serving.health", "--gateway", f"127.0.0.1:{port}"]
    assert importlib.util.find_spec("builder.serving.health")
    assert check["start_period"] == "30m", "as long as ServerOptions.timeout"
    assert ServerOptions.timeout == 30 * 60


def test_the_gateway_in_it_gets_the_collectors_address_if_there_is_one() -> None:
    passed = {name for name in SERVICES["triton"]["environment"] if name.startswith("OTEL_")}
    assert {name for name in usage.ENVIRONMENT if name.startswith("OTEL_") and "PROTOCOL" not in name} <= passed
    assert all(SERVICES["triton"]["environment"][name] is None for name in passed)
    assert [name for name in SERVICES if set(SERVICES[name].get("environment", ())) & passed] == ["triton"]


def test_a_container_is_not_killed_while_it_drains() -> None:
    grace = int(SERVICES["triton"]["stop_grace_period"].removesuffix("s"))
    assert grace > limits.DRAIN_SECONDS + gateway.KILL_SECONDS + draining.LEAST_SECONDS + 5
    assert grace > ServerOptions.exit_timeout + draining.LEAST_SECONDS + 5


@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "compose.cpu.yml"]])
def test_compose_reads_the_files(files: list[str], tmp_path: Path) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    options = [word for file in files for word in ("-f", file)]
    environment = {**os.environ, "ARTIFACTS_DIR": str(tmp_path), "OPENAI_PORT": "9100"}
    done = subprocess.run(
        ["docker", "compose", *options, "--profile", "*", "config", "--format", "json"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    triton = json.loads(done.stdout)["services"]["triton"]
    assert triton["restart"] == "unless-stopped"
    assert triton["healthcheck"]["start_period"] in ("30m0s", "1800s")
    assert {(port["host_ip"], port["published"]) for port in triton["ports"]} == {
        ("127.0.0.1", port) for port in ("9100", "8000", "8001", "8002")
    }


def test_no_token_comes_near_the_image() -> None:
    assert "TOKEN" not in DOCKERFILE
    assert {name for name in SERVICES if SERVICES[name].get("secrets") == ["hf_token"]} == {"build", "eval"}
    assert COMPOSE["secrets"] == {"hf_token": {"file": "${HF_TOKEN_FILE:-/dev/null}"}}


def test_usage_data_is_off_unless_somebody_asks_for_it() -> None:
    for name in ("build", "eval", "triton"):
        assert SERVICES[name]["environment"]["TRTLLM_NO_USAGE_STATS"] == "${TRTLLM_NO_USAGE_STATS:-1}"
        assert SERVICES[name]["environment"]["BUILDER_LLMAPI_LAUNCH"] is None  # from outside, where it is set
    assert "\n    TRTLLM_NO_USAGE_STATS=1 \\\n" in DOCKERFILE


def test_the_images_openai_stays_and_the_llmapi_target_gets_another() -> None:
    [install] = [line for line in DOCKERFILE.split("\nRUN ") if "openai==" in line]
    directory = re.findall(r"--target (\S+) openai==1\.109\.1;", install)
    assert directory == re.findall(rf"{llmapi_launch.OVERLAY}=(\S+)", DOCKERFILE)
    assert "--no-deps" in install
    # Only where the image has one, and one without the name that TensorRT-LLM takes from it.
    assert install.startswith("if python3 -c 'import openai'")
    assert "import PartReasoningText' 2>/dev/null; then" in install
    needed = run_packages("requirements", "pyproject.toml", "quantize", "serve", "telemetry", "tasks").stdout
    assert "starlette" in needed
    assert "openai" not in needed, "the gateway does without it; only its tests use the package"


def test_the_image_gets_nothing_but_what_it_needs() -> None:
    """.dockerignore admits exactly what the Dockerfile copies or mounts: no .env, no artifacts, no .git."""
    let_in = set(re.findall(r"^!(.+)$", Path(".dockerignore").read_text(), re.M))
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M) for name in line.split()}
    mounted = set(re.findall(r"type=bind,source=([\w./]+)", DOCKERFILE))
    assert let_in == copied | mounted
    assert Path(".dockerignore").read_text().startswith("*\n")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The metrics of a Triton server that runs here."""
    models = one_model(tmp_path_factory.mktemp("metrics") / "models")
    with serve(models, out=Output("quiet")) as server:
        text = urllib.request.urlopen(f"http://{server.metrics_url}/metrics").read().decode()
    return set(re.findall(r"^# TYPE (\S+)", text, re.M))


def test_the_dashboard_asks_for_what_the_server_shows(shown: set[str]) -> None:
    names = yaml.safe_load(Path("docker/metrics/names.yaml").read_text())
    asked = {name for query in QUERIES for name in re.findall(r"\bnv_\w+", query)}
    histograms = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked if name.startswith("nv_llm_")}
    known = shown | set(names["gpu"]) | set(names["tensorrt_llm"])
    assert {name for name in asked if name.startswith("nv_inference_")} <= shown
    assert {name for name in asked if not name.startswith("nv_llm_")} | histograms <= known
    assert any(name.startswith("nv_trt_llm_") for name in asked)


def test_the_dashboard_asks_for_labels_that_upstream_has() -> None:
    families: dict[str, Any] = yaml.safe_load(Path("docker/metrics/names.yaml").read_text())["tensorrt_llm"]
    found = re.findall(r'(nv_trt_llm_\w+)\{(\w+)=~?"([^"]+)"\}', " ".join(QUERIES))
    assert len(found) == " ".join(QUERIES).count("{")
    for name, label, values in found:
        assert families[name]["label"] == label
        assert set(values.split("|")) <= set(families[name]["values"])


def test_prometheus_asks_triton_where_it_listens() -> None:
    scraped = yaml.safe_load(Path("docker/metrics/prometheus.yml").read_text())["scrape_configs"]
    command = SERVICES["triton"]["command"]
    for job, option in zip(scraped, ("--metrics-port", "--port"), strict=True):
        assert job["static_configs"] == [{"targets": [f"triton:{command[command.index(option) + 1]}"]}]
    source = yaml.safe_load(Path("docker/metrics/grafana/datasources/prometheus.yml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}


def run_packages(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "docker/image_packages.py", *argv], capture_output=True, text=True)


def test_a_package_that_pip_moved_is_found(tmp_path: Path) -> None:
    file = tmp_path / "shipped.txt"
    assert run_packages("save", str(file)).returncode == 0
    assert run_packages("compare", str(file)).returncode == 0
    lines = file.read_text().splitlines()
    moved = [re.sub("==.*", "==0.0.1", line) if line.startswith("pyyaml==") else line for line in lines]
    file.write_text("\n".join([*moved, "gone==1.0", "# python-apt==2.6+ubuntu0.1~x"]))
    done = run_packages("compare", str(file))
    assert done.returncode == 1
    for line in ("pyyaml: 0.0.1 -> 6", "gone: 1.0 -> removed", "python-apt: 2.6+ubuntu0.1~x -> removed"):
        assert line in done.stderr


def test_a_base_image_of_another_version_is_refused() -> None:
    assert run_packages("expect", "tensorrt_llm", "none").returncode == 0
    done = run_packages("expect", "tensorrt_llm", "1.2.1")
    assert (done.returncode, "has tensorrt_llm none, not 1.2.1" in done.stderr) == (1, True)


def test_the_image_installs_what_pyproject_asks_for() -> None:
    done = run_packages("requirements", "pyproject.toml", "quantize", "serve")
    lines = done.stdout.splitlines()
    assert "tritonclient[http,grpc]>=2.51" in lines
    assert any(line.startswith("pydantic") for line in lines)
    assert not any(line.startswith(("pytest", "docker")) for line in lines)
