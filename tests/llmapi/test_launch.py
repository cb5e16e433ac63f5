"""How a server of the llmapi target is started: ranks, environment, and what is checked before."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llmapi_stand_in import put_stand_in

from builder.core.errors import ServingError
from builder.gateway.engine import Engine
from builder.gateway.settings import Model, places
from builder.gateway.tensors import Sampling, Step, TokenRequest
from builder.llmapi import launch as llmapi_launch
from builder.llmapi import repository as llmapi_repository
from builder.serving.launch import world_size
from builder.serving.readiness import start_failure
from builder.serving.server import Server, serve
from builder.triton.repository import Repository
from builder.trtllm import build_log
from tests.llmapi.test_serving import QUIET, generate, unified, write
from tests.llmapi.test_versions import adapter

_ = unified  # a fixture
SERVERS = [["/t", f"--rank={rank}"] for rank in range(3)]
# As mpirun: the ranks' commands, each told which rank it is; it passes SIGTERM on.
MPIRUN = """#!{python}
import os, signal, subprocess, sys
words, ranks = sys.argv[1:], [[]]
assert words[:2] == ["--allow-run-as-root", "--oversubscribe"], words
for word in words[2:]:
    ranks.append([]) if word == ":" else ranks[-1].append(word)
children = []
for rank, (n, one, *command) in enumerate(ranks):
    assert (n, one) == ("-n", "1")
    told = {{"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(len(ranks)), "OMPI_MCA_btl": "self"}}
    children.append(subprocess.Popen(command, env={{**os.environ, **told}}))
signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
sys.exit(max(child.wait() for child in children))
"""
WRAPPER = """#!/bin/bash
if [ "$OMPI_COMM_WORLD_RANK" != 0 ]; then echo "a worker of rank $OMPI_COMM_WORLD_RANK"; exec sleep 600; fi
task="${@:1}"
exec $task
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with stand-ins for mpirun and the wrapper, first on the PATH."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in (("mpirun", MPIRUN.format(python=sys.executable)), (llmapi_launch.WRAPPER, WRAPPER)):
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    monkeypatch.delenv(llmapi_launch.ALWAYS, raising=False)
    return place


def repository(root: Path, text: str) -> Path:
    file = root / "models" / llmapi_repository.MODEL / "1" / "model.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return root / "models"


# ---- the command


def test_ranks_are_started_as_upstreams_ci_does(programs: Path) -> None:
    mpirun, wrapper = str(programs / "mpirun"), str(programs / "trtllm-llmapi-launch")
    assert llmapi_launch.command(SERVERS[:1]) == SERVERS[0]
    first = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "1", wrapper, *SERVERS[0]]
    second = [":", "-n", "1", wrapper, *SERVERS[1]]
    assert llmapi_launch.command(SERVERS[:2]) == [*first, *second]
    assert llmapi_launch.command(SERVERS).count(":") == 2


def test_one_rank_takes_the_wrapper_where_it_is_asked_for(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llmapi_launch.ALWAYS, "1")
    assert llmapi_launch.command(SERVERS[:1]) == [str(programs / "trtllm-llmapi-launch"), *SERVERS[0]]


def test_a_missing_program_is_said(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(programs))
    (programs / "mpirun").unlink()
    with pytest.raises(ServingError, match=r"2 ranks are started by .* and mpirun, and mpirun is not on the PATH"):
        llmapi_launch.command(SERVERS[:2])
    (programs / llmapi_launch.WRAPPER).unlink()
    with pytest.raises(ServingError, match="mpirun are not on the PATH"):
        llmapi_launch.command(SERVERS[:2])


def test_a_word_that_the_wrapper_would_take_apart_is_refused(programs: Path) -> None:
    with pytest.raises(ServingError, match="has a space"):
        llmapi_launch.command([["/t", "--model-repository=/a b"], ["/t"]])


def test_ranks_are_counted_in_the_yaml(tmp_path: Path) -> None:
    models = repository(tmp_path, "tensor_parallel_size: 2\npipeline_parallel_size: 3\n")
    assert world_size(models) == llmapi_launch.world_size(models) == 6
    assert llmapi_launch.world_size(tmp_path) == 1


def test_two_ranks_serve(programs: Path, unified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the job's variables, which mpirun sets, where TensorRT-LLM is imported; with what mpirun is set to."""
    write(tmp_path / "models", unified, **{"engine.tp": 2})
    put_stand_in(tmp_path / "models")
    monkeypatch.setenv("PMIX_RANK", "0")
    with serve(tmp_path / "models", out=QUIET, log=tmp_path / "log") as server:
        assert generate(server, "A list is", 4)["text_output"]
        log = server.log.read_text()
    assert "a worker of rank 1" in log
    [said] = re.findall(r"stand-in: environment (\{.*\})", log)
    assert {name: value for name, value in json.loads(said).items() if name.startswith(("OMPI", "PMI"))} == {
        "OMPI_MCA_btl": "self"
    }
    assert json.loads(said)["TRTLLM_NO_USAGE_STATS"] == "1"


def through_gateway(server: Server, models: Path, facts: dict[str, Any], adapter: str) -> None:
    """A request as the gateway sends it for this model with this adapter."""
    model = replace(Model.read(models, facts), adapter=adapter)

    async def run() -> None:
        engine = Engine(server.grpc_url, model)
        steps: list[Step] = []
        request = TokenRequest([5, 6, 7], 4, Sampling(temperature=0), [], streaming=True)
        await engine.generate(request, "id", lambda step: bool(steps.append(step)) or True)
        await engine.close()
        assert "".join(step.text for step in steps)

    asyncio.run(run())


def test_adapters_are_models_of_the_gateway() -> None:
    opened = Repository(Path("both"), "", {"members": {"a": {"adapters": ["x", "y"]}, "b": {}}})
    found = places(opened, {"a": "chat", "b": "code"}, "host:1")
    assert [(place.name, place.member, place.adapter) for place in found] == [
        ("chat", "a", ""), ("chat:x", "a", "x"), ("chat:y", "a", "y"), ("code", "b", ""),
    ]  # fmt: skip


def test_speculation_and_adapters_are_served(unified: Path, tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    asked = {
        "llmapi.args.lora_config.lora_dir": [str(one), str(two)],
        "llmapi.args.lora_config.lora_target_modules": ["attn_q", "attn_k", "attn_v"],
        "llmapi.args.speculative_config.decoding_type": "NGram",
    }
    facts = write(tmp_path / "models", unified, **asked)
    put_stand_in(tmp_path / "models")
    with serve(tmp_path / "models", out=QUIET, log=tmp_path / "log") as server:
        assert generate(server, "A list is", 4)["text_output"]
        assert "adapter {" not in server.log.read_text()
        generate(server, "A list is", 4, lora_name="two")
        through_gateway(server, tmp_path / "models", facts, "")
        through_gateway(server, tmp_path / "models", facts, "one")
        log = server.log.read_text()
    found = [json.loads(text) for text in re.findall(r"stand-in: adapter (\{.*\})", log)]
    wanted = {"lora_name": "two", "lora_int_id": 2, "lora_path": str(two), "lora_ckpt_source": "hf"}
    assert found == [wanted, {**wanted, "lora_name": "one", "lora_int_id": 1, "lora_path": str(one)}]
    [said] = re.findall(r"stand-in for TensorRT-LLM: (\{.*\})", log)
    assert json.loads(said)["speculative_config"]["max_draft_len"] == 4


# ---- the environment


def test_usage_data_is_off_unless_the_yaml_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in llmapi_launch.OPT_OUTS:
        monkeypatch.delenv(name, raising=False)
    given = {"PATH": "/nowhere"}
    for text in ("dtype: auto", "telemetry_config: {disabled: true}", "telemetry_config: {usage_context: cli_serve}"):
        assert llmapi_launch.environment(repository(tmp_path, text), given) == {**given, "TRTLLM_NO_USAGE_STATS": "1"}
    models = repository(tmp_path, "telemetry_config: {disabled: false}")
    assert llmapi_launch.environment(models, given) == given
    monkeypatch.setenv("DO_NOT_TRACK", "1")  # whoever says so anywhere is heard
    assert llmapi_launch.environment(models, given) == {**given, "DO_NOT_TRACK": "1"}
    assert llmapi_launch.environment(tmp_path, given) == given  # another target


def test_variables_of_a_job_are_removed_and_settings_stay() -> None:
    kept = {"OMPI_MCA_btl": "self", "PMIX_MCA_gds": "hash", "PATH": "/bin", "SLURM_JOB_ID": "1"}
    job = {"OMPI_COMM_WORLD_RANK": "0", "PMIX_SERVER_URI41": "", "OMPI_MCA_orte_x": "", "PMI_SIZE": "2"}
    found = llmapi_launch.without_job({**kept, **job, "SLURM_PROCID": "0", "ORTE_X": "1"})
    assert found == {**kept, "PMIX_SERVER_URI41": ""}


def model_code(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("pb_utils"))
    file = llmapi_repository.TEMPLATE / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("llmapi_model", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_removes_the_same_and_puts_the_overlay_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_code(monkeypatch)
    names = {prefix + name for prefix, ends in model.JOB.items() for name in ends}
    assert names | {"SLURM_PROCID", "SLURM_NTASKS"} == llmapi_launch.JOB
    assert model.JOB_PREFIXES == llmapi_launch.JOB_PREFIXES
    assert model.OVERLAY == llmapi_launch.OVERLAY
    variables = {**dict.fromkeys(names, "1"), "OMPI_MCA_orte_x": "1", "OMPI_MCA_btl": "self", "PYTHONPATH": "/a"}
    monkeypatch.setattr(os, "environ", {**variables, model.OVERLAY: str(tmp_path)})
    monkeypatch.setattr(sys, "path", ["/b"])
    model.prepare_environment()
    assert sys.path == [str(tmp_path), "/b"]
    assert os.environ == {
        "OMPI_MCA_btl": "self", "PYTHONPATH": f"{tmp_path}{os.pathsep}/a", model.OVERLAY: str(tmp_path)
    }  # fmt: skip


# ---- the openai package


def package(root: Path, name: str, **files: str) -> None:
    for file, text in {"__init__": "", **files}.items():
        place = root / name / f"{file.replace('.', '/')}.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    for directory in [path for path in (root / name).rglob("*") if path.is_dir()]:
        (directory / "__init__.py").touch()


EVENT = "types.responses.response_content_part_added_event"
NEEDS = f"from openai.{EVENT} import PartReasoningText"


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with TensorRT-LLM and an openai package that is too old for it."""
    package(tmp_path / "site", "tensorrt_llm", **{"serve.responses_utils": NEEDS})
    package(tmp_path / "site", "openai", **{EVENT: "class Part: ..."})
    package(tmp_path / "overlay", "openai", **{EVENT: "class PartReasoningText: ..."})
    return {"PATH": f"{Path(sys.executable).parent}:/usr/bin", "PYTHONPATH": str(tmp_path / "site")}


def test_an_openai_that_is_too_old_is_said_before_anything_starts(
    installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = repository(tmp_path, "dtype: auto")
    for overlay in ("", str(tmp_path / "nowhere")):
        monkeypatch.setenv(llmapi_launch.OVERLAY, overlay)
        with pytest.raises(ServingError, match="can't be imported here") as caught:
            llmapi_launch.environment(models, installed)
        assert "cannot import name 'PartReasoningText'" in caught.value.why
        assert "openai==1.109.1" in caught.value.hint


def test_the_overlay_comes_first_where_it_is_needed(
    installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, overlay = repository(tmp_path, "dtype: auto"), str(tmp_path / "overlay")
    monkeypatch.setenv(llmapi_launch.OVERLAY, overlay)
    found = llmapi_launch.environment(models, {**installed, llmapi_launch.OVERLAY: overlay})
    assert found["PYTHONPATH"] == f"{overlay}{os.pathsep}{tmp_path / 'site'}"
    assert found[llmapi_launch.OVERLAY] == overlay
    package(tmp_path / "site", "openai", **{EVENT: "class PartReasoningText: ..."})  # a newer one in the image
    found = llmapi_launch.environment(models, {**installed, llmapi_launch.OVERLAY: overlay})
    assert found["PYTHONPATH"] == str(tmp_path / "site")
    assert llmapi_launch.OVERLAY not in found


def test_a_version_that_does_not_take_the_name_needs_no_newer_openai(
    installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(llmapi_launch.OVERLAY, raising=False)
    (tmp_path / "site/tensorrt_llm/serve/responses_utils.py").write_text("")
    assert llmapi_launch.import_error(installed) == ""


# ---- known failures


@pytest.mark.parametrize(
    ("line", "name", "hint"),
    [
        ("ImportError: cannot import name 'PartReasoningText' from 'openai.types.responses.response_content_part_"
         "added_event' (/usr/lib/x.py)", "openai-too-old", "openai==1.109.1"),
        ("mpi4py.MPI.Exception: MPI_ERR_SPAWN: could not spawn processes", "mpi-spawn", "BUILDER_LLMAPI_LAUNCH=1"),
    ],
)  # fmt: skip
def test_a_known_failure_of_a_server_is_told_with_its_cure(tmp_path: Path, line: str, name: str, hint: str) -> None:
    log = tmp_path / "server.log"
    log.write_text(f"something\n{line}\n")
    known = build_log.diagnose(line, "serving")
    assert known
    assert known.name == name
    error = start_failure("Triton ended.", log)
    assert error.why.startswith(f"{known.why} ({known.source})\n")
    assert line in error.why
    assert hint in error.hint
    assert str(log) in error.hint
    assert build_log.diagnose(line) is None  # of trtllm-build's
    log.write_text("something\n")
    assert start_failure("Triton ended.", log).hint == f"The full log: {log}"
