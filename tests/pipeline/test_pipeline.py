"""The main job, end to end, with the real parts: ModelOpt calibrates, Triton serves, tritonclient asks."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from printed_json import first_object

from builder.cli import main
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.machine.gpus import Seen
from builder.trtllm import compatibility, engine
from tests.trtllm.test_engine import RTX_5090, stand_in

__all__ = ["stand_in"]  # a fixture
MODEL = "tests/data/tiny-qwen3"
LLAMA = Path("tests/data/arch-variants/llama")
SMALL = ["--gpu", "cpu", "--calib-samples", "6", "--calib-seq-len", "64"]
# The same checkpoint for a card: the text is that of the profile cpu.
FOR_A_CARD = ["--model", MODEL, "--gpu", "sm120", "--calib-data", "builtin:python-docs", *SMALL[2:]]


def builder(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = (sys.executable, "-m", "builder", *argv)
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **(env or {})})


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo, once: its output directory and what --json said."""
    output = tmp_path_factory.mktemp("main") / "artifacts"
    junit = output.parent / "smoke.xml"
    done = builder(
        "build", "--model", MODEL, *SMALL, "--output", str(output), "--json", "--junit", str(junit),
        env={"HF_TOKEN": "hf_secretsecretsecret"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def test_one_command_leaves_a_tested_repository(built: tuple[Path, dict[str, Any]]) -> None:
    output, said = built
    repository = Path(said["repository"])
    assert repository == output / "models" / "tiny-qwen3-cpu-nvfp4"
    models = {path.parent.name for path in (repository / "models").glob("*/config.pbtxt")}
    assert models >= {"preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls"}
    assert said["smoke"]["passed"]
    assert said["smoke"]["sample"]["answer"].strip()
    assert (output.parent / "smoke.xml").read_text().count("<testcase") == len(said["smoke"]["checks"])
    assert not leftovers(output)


def test_the_checkpoint_is_in_both_layouts_and_was_inspected(built: tuple[Path, dict[str, Any]]) -> None:
    output, _ = built
    [manifest] = (output / "checkpoint").glob("*/manifest.json")
    facts = json.loads(manifest.read_text())["facts"]
    assert (manifest.parent / "unified" / "hf_quant_config.json").is_file()
    assert (manifest.parent / "tensorrt_llm" / "rank0.safetensors").is_file()
    for layout in ("unified", "tensorrt_llm"):
        assert 4.5 <= facts["inspection"]["layouts"][layout]["bits_per_weight"] < 4.51
    assert facts["inspection"]["findings"] == []
    inspected = builder("inspect", str(manifest.parent))
    assert (inspected.returncode, "no problem found" in inspected.stderr) == (0, True)


def test_a_second_run_does_nothing_says_so_and_imports_no_torch(built: tuple[Path, dict[str, Any]]) -> None:
    output, _ = built
    argv = [sys.executable, "-X", "importtime", "-m", "builder", "build", "--model", MODEL, *SMALL]
    done = subprocess.run([*argv, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0
    assert "nothing to do: every stage is cached" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time" in line}
    assert not {"torch", "transformers", "modelopt", "tritonclient"} & imported
    assert "builder.pipeline" in imported


def test_plan_finds_it_all_in_the_store(built: tuple[Path, dict[str, Any]]) -> None:
    output, _ = built
    plan = json.loads(builder("plan", "--model", MODEL, *SMALL, "--output", str(output), "--json").stdout)
    assert {row["state"] for row in plan["stages"]} == {"cached"}
    other = builder("plan", "--model", MODEL, *SMALL, "--max-batch-size", "2", "--output", str(output), "--json").stdout
    states = {row["stage"]: row["state"] for row in json.loads(other)["stages"]}
    assert (states["checkpoint"], states["engine"], states["smoke"]) == ("cached", "will run", "will run")


def test_a_served_repository_is_not_cleaned(built: tuple[Path, dict[str, Any]]) -> None:
    output, said = built
    argv = [sys.executable, "-m", "builder", "serve", said["repository"]]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("openai ")
        planned = json.loads(builder("clean", "--all", "--dry-run", "--json", "--output", str(output)).stdout)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    stays = {Path(entry["path"]).parent.name for entry in planned["kept"] if "is being served" in entry["why"]}
    assert stays >= {"snapshot", "calibration", "checkpoint", "engine", "repository", "smoke"}
    free = json.loads(builder("clean", "--all", "--dry-run", "--json", "--output", str(output)).stdout)
    assert {Path(path).parent.name for path in free["removed"]} >= stays


def test_the_engine_command_names_the_checkpoint_of_the_store(built: tuple[Path, dict[str, Any]]) -> None:
    output, said = built
    checkpoint = next(stage["path"] for stage in said["stages"] if stage["stage"] == "checkpoint")
    command = json.loads(builder("engine", "--dry-run", *FOR_A_CARD, "--output", str(output), "--json").stdout)
    assert command["placeholder"] is None
    assert f"--checkpoint_dir {checkpoint}/tensorrt_llm " in command["shell"][-1]


def test_a_repository_at_odds_with_its_engine_is_not_served(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Edited by hand, or its engine gone: exit code 6 with what, why and hint, and no server."""
    found = Path(built[1]["repository"]).resolve()
    repository = Path(shutil.copytree(found, tmp_path / "repository" / found.name))
    (tmp_path / "engine").symlink_to(found.parents[1] / "engine")  # which the repository refers to by a relative path
    config = repository / "models" / "tensorrt_llm" / "config.pbtxt"
    text = config.read_text()
    for old, new, what in (
        ("max_batch_size: 8", "max_batch_size: 9", "max_batch_size is 9"),
        ("max_batch_size: 8", "max_batch_size: 256", "max_batch_size is 256"),
        ("/engine/", "/nowhere/", "There is no engine at"),
    ):
        config.write_text(text.replace(old, new))
        done = builder("smoke", str(repository))
        assert (done.returncode, what in done.stderr) == (6, True), done.stderr


def test_a_repository_for_a_card_is_made_where_it_is_and_served_nowhere_else(
    built: tuple[Path, dict[str, Any]],
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the same checkpoint, by the stand-in for trtllm-build on a machine that shows an RTX 5090."""
    output, _ = built
    argv = [*FOR_A_CARD, "--output", str(output)]
    monkeypatch.setattr(engine, "visible", list)
    assert main.main(["render", *argv]) == 3  # no GPU: refused before any work
    assert "no GPU is visible" in capsys.readouterr().err
    monkeypatch.setattr(engine, "visible", lambda: [RTX_5090])
    assert main.main(["render", *argv, "--json"]) == 0
    said = capsys.readouterr()
    assert "trtllm-build: building the TensorRT engine" in said.err
    repository = json.loads(said.out)["repository"]
    monkeypatch.setattr(compatibility, "visible", list)
    assert main.main(["serve", repository]) == 6
    assert "The engine has 1 rank, and no GPU is visible here" in capsys.readouterr().err
    monkeypatch.setattr(compatibility, "visible", lambda: [Seen("NVIDIA B200", 10, 0, "590.44.01")])
    assert main.main(["smoke", repository]) == 6
    assert "built for sm120 (NVIDIA GeForce RTX 5090), and GPU 0 here, NVIDIA B200, is sm100" in capsys.readouterr().err


def test_the_report_tells_what_was_built_and_what_was_not_measured(built: tuple[Path, dict[str, Any]]) -> None:
    output, said = built
    told = json.loads(builder("report", said["repository"], "--json").stdout)
    assert told["verdict"]["status"] == "passed"
    assert told["verdict"]["headline"] == "It serves, and passed the quality check"
    assert told["quality"]["figures"] == said["quality"]["figures"]
    assert told["smoke"]["sample"] == said["smoke"]["sample"]
    assert ["calibration.samples", 6, "command line"] in told["values"]
    assert {stage["name"]: stage["key"] for stage in told["stages"]} == {s["stage"]: s["key"] for s in said["stages"]}
    assert "not run on a GPU" in told["unmeasured"][0]
    page, card = (Path(told["files"][kind]).read_text() for kind in ("html", "markdown"))
    assert page.startswith("<!doctype html>")
    assert said["smoke"]["sample"]["answer"].strip() in card
    again = builder(*shlex.split(told["command"])[1:], "--output", str(output), "--json")
    assert all(stage["cached"] for stage in json.loads(again.stdout)["stages"]), "the command makes the same again"


@pytest.mark.slow
def test_a_gate_ends_a_build_with_4_publishes_nothing_and_keeps_everything(
    built: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """BF16 itself has 100. The verdict stands in a manifest; with a lower limit nothing is measured again."""
    output, said = built
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(Path("tests/data/eval/prose.jsonl").read_text().splitlines(keepends=True)[:6]))
    argv = ["build", "--model", MODEL, *SMALL, "--data", str(texts), "--output", str(output), "--json"]
    failed = builder(*argv, "--min-score", "101")
    assert failed.returncode == 4, failed.stderr
    assert "error: The model fails the gate: score of checkpoint on texts is" in failed.stderr
    told = json.loads(failed.stdout)
    assert told["repository"] is None
    assert told["verdict"]["status"] == "failed"
    assert Path(said["repository"]).exists(), "the link of the build before stays"
    assert told["evaluation"]["verdict"]["passed"] is False
    manifests = [json.loads(path.read_text()) for path in output.glob("evaluation/*/manifest.json")]
    assert [manifest["facts"]["verdict"]["passed"] for manifest in manifests] == [False]
    assert json.loads(builder("report", said["repository"], "--json").stdout)["verdict"]["status"] == "failed"
    asked = [*argv[1:], "--max-batch-size", "2"]  # another engine, of the same checkpoint
    limits = {"101": ("cached", "failed"), "50": ("will run", "all scores are there")}
    for limit, row in limits.items():
        stages = json.loads(builder("plan", *asked, "--min-score", limit).stdout)["stages"]
        states = {one["stage"]: one["state"] for one in stages}
        assert (states["checkpoint"], states["engine"]) == ("cached", "will run")
        assert (stages[-1]["stage"], stages[-1]["state"]) == ("evaluation", row[0])
        assert stages[-1]["why"].endswith(f"a gate (score {limit}): {row[1]}")
    for more, why in (
        (["--data", "tests/data/eval/chat.jsonl"], "its texts are not read yet"),
        (["--runner", "bf16", "--runner", "simulated"], "simulated has not been measured on texts"),
    ):
        stages = json.loads(builder("plan", *asked, *more, "--min-score", "50").stdout)["stages"]
        assert (stages[-1]["state"], stages[-1]["why"]) == ("will run", f"a gate (score 50): {why}")
    passed = builder(*argv, "--min-score", "50", "--max-kl", "2")
    assert passed.returncode == 0, passed.stderr
    assert json.loads(passed.stdout)["repository"] == said["repository"]
    assert json.loads(builder("report", said["repository"], "--json").stdout)["verdict"]["status"] == "passed"
    assert "2 data sets" not in passed.stderr
    assert len(list(output.glob("scores/*"))) == 2, "one data set, two runners"
    evaluated = builder("eval", *argv[1:-1], "--runner", "bf16", "--runner", "checkpoint")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "checkpoint\ttexts\t" in evaluated.stdout
    assert evaluated.stdout.splitlines()[-1].startswith("kept       ")
    assert len(list(output.glob("scores/*"))) == 2
    made = {path: path.stat().st_mtime_ns for path in output.glob("scores/*/manifest.json")}
    forced = builder("eval", *argv[1:-1], "--runner", "bf16", "--runner", "checkpoint", "--force", "scores")
    assert forced.returncode == 0, forced.stderr
    assert all(path.stat().st_mtime_ns > before for path, before in made.items())
    seconds = re.compile(r"\d+\.\ds")
    assert seconds.sub("", forced.stdout) == seconds.sub("", evaluated.stdout), "all but the times"


@pytest.mark.slow
def test_two_and_two_gpus_need_no_second_calibration(built: tuple[Path, dict[str, Any]]) -> None:
    """The same checkpoint, split; the reference executor puts the ranks together, and the answers are the same."""
    output, said = built
    argv = ["build", "--model", MODEL, *SMALL, "--output", str(output), "--json", "--no-quality-check"]
    done = builder(*argv, "--tp", "2", "--pp", "2")
    assert done.returncode == 0, done.stderr
    split = json.loads(done.stdout)
    cached = {stage["stage"]: stage["cached"] for stage in split["stages"]}
    assert list(cached.items())[2:5] == [("checkpoint", True), ("ranks", False), ("engine", False)]
    engine = Path(next(stage["path"] for stage in split["stages"] if stage["stage"] == "engine"))
    assert sorted(path.name for path in engine.glob("rank*")) == [f"rank{rank}.safetensors" for rank in range(4)]
    assert split["smoke"]["passed"]
    assert split["smoke"]["sample"] == said["smoke"]["sample"]
    again = builder(*argv)
    assert json.loads(again.stdout)["stages"][-1]["path"] == said["stages"][-1]["path"]


def test_a_model_that_cannot_be_split_so_is_refused_at_once(tmp_path: Path) -> None:
    refused = builder("build", "--model", MODEL, *SMALL, "--tp", "3", "--output", str(tmp_path))
    assert refused.returncode == 3
    assert "8 attention heads are not divisible by 3" in refused.stderr
    assert not (tmp_path / "calibration").exists()


def test_every_stored_file_is_verified_and_no_secret_is_in_one(built: tuple[Path, dict[str, Any]]) -> None:
    output, _ = built
    assert builder("verify", "--output", str(output)).returncode == 0
    for path in output.rglob("*"):
        if path.is_file():
            assert b"hf_secretsecretsecret" not in path.read_bytes(), path


def test_a_changed_weight_is_another_build(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The content decides, not the name or the time."""
    output, _ = built
    copy = shutil.copytree(MODEL, tmp_path / "tiny-qwen3")
    plan = json.loads(builder("fetch", "--model", str(copy), *SMALL, "--output", str(output), "--json").stdout)
    assert not plan["stages"][0]["cached"]
    same = json.loads(builder("plan", "--model", str(copy), *SMALL, "--output", str(output), "--json").stdout)
    assert {row["state"] for row in same["stages"]} == {"cached"}
    shard = copy / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x3f")
    builder("fetch", "--model", str(copy), *SMALL, "--output", str(output))
    changed = json.loads(builder("plan", "--model", str(copy), *SMALL, "--output", str(output), "--json").stdout)
    assert {row["stage"]: row["state"] for row in changed["stages"]}["checkpoint"] == "will run"


def test_a_model_of_the_hub_goes_the_same_way(
    hub: Hub, built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its id: planned without its weights, downloaded, and then, since it is the same model, found in the store."""
    output, said = built
    commit = hub.add("tiny/qwen3", Path(MODEL))
    argv = ["--model", "tiny/qwen3", *SMALL, "--output", str(output), "--json"]
    plan = json.loads(builder("plan", *argv).stdout)
    parameters = sum(math.prod(info.shape) for info in Tensors(Path(MODEL)).values())
    assert (plan["stages"][0]["state"], plan["sizes"]["parameters"]) == ("will run", parameters)
    assert all(r.range == "bytes=0-100000" for r in hub.downloads("model-00001-of-00003.safetensors"))  # its header
    done = json.loads(builder("build", *argv).stdout)
    assert [stage["cached"] for stage in done["stages"]] == [False, True, True, True, True, True]
    assert done["repository"] == str(output / "models" / "qwen3-cpu-nvfp4")
    assert Path(done["repository"]).resolve() == Path(said["repository"]).resolve()
    manifest = json.loads((Path(done["stages"][0]["path"]) / "manifest.json").read_text())
    assert manifest["ingredients"]["commit"] == commit
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.requests)
    assert all(stage["cached"] for stage in json.loads(builder("build", *argv).stdout)["stages"])
    assert len(hub.requests) == before


def test_a_killed_build_leaves_no_process_and_nothing_that_is_trusted(tmp_path: Path) -> None:
    """SIGKILL while ModelOpt works: its process ends too, and the next build starts that stage anew."""
    argv = [sys.executable, "-m", "builder", "quantize", "--model", str(LLAMA), *SMALL, "--output", str(tmp_path)]
    child = subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("logs/*quantize*.log")):
        assert child.poll() is None
        time.sleep(0.02)
    time.sleep(1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _running(str(tmp_path)):
        time.sleep(0.05)
    assert not _running(str(tmp_path))
    assert leftovers(tmp_path)
    assert not list((tmp_path / "checkpoint").glob("[!.]*"))
    done = builder("quantize", "--model", str(LLAMA), *SMALL, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not leftovers(tmp_path)


def test_a_stop_signal_ends_a_build_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "builder", "quantize", "--model", str(LLAMA), *SMALL, "--output", str(tmp_path)]
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not list(tmp_path.glob("logs/*quantize*.log")):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted")
    assert not _running(str(tmp_path))
    assert not leftovers(tmp_path)


def test_serve_runs_until_it_is_stopped(built: tuple[Path, dict[str, Any]]) -> None:
    output, said = built
    argv = [sys.executable, "-m", "builder", "serve", said["repository"], "--json", "--follow-log"]
    child = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    where = first_object(child)
    body = json.dumps({"text_input": "Return the number of", "max_tokens": 8}).encode()
    with urllib.request.urlopen(f"http://{where['http']}/v2/models/ensemble/generate", body, timeout=30) as answer:
        assert json.load(answer)["text_output"]
    at = ["--http", where["http"], "--grpc", where["grpc"]]
    named = {"MODEL_REPOSITORY": Path(said["repository"]).name}
    smoked = builder("smoke", *at, "--output", str(output), "--json", env=named)
    assert smoked.returncode == 0, smoked.stderr
    assert json.loads(smoked.stdout)["passed"]
    child.send_signal(signal.SIGTERM)
    _, log = child.communicate(timeout=60)
    assert child.returncode == 0
    assert "Started HTTPService" in log
    assert not _running(said["repository"])
    assert not Path(f"/proc/{where['pid']}").exists()


def test_serve_ends_with_its_stdin_when_asked_to(built: tuple[Path, dict[str, Any]]) -> None:
    argv = [sys.executable, "-m", "builder", "serve", built[1]["repository"], "--until-eof"]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("openai ")
    child.communicate(timeout=60)  # closes its stdin
    assert child.returncode == 0
    assert not _running(built[1]["repository"])


def _running(word: str) -> list[str]:
    """Command lines of live processes that name `word`, this one's own aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if word in text and int(path.parent.name) != os.getpid():
            found.append(text)
    return found


def damaged_llama(directory: Path, tensor: str, data: bytes) -> Path:
    """The llama variant with the first bytes of one tensor replaced."""
    shutil.copytree(LLAMA, directory)
    source = Tensors(LLAMA)

    def changed(name: str) -> bytes:
        whole = source.read(name)
        return data + whole[len(data) :] if name == tensor else whole

    tensors = [NewTensor(name, info.dtype, info.shape, [changed(name)]) for name, info in source.items()]
    write(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


NAN = b"\xc0\x7f"


def test_broken_weights_end_the_build_and_are_named(tmp_path: Path) -> None:
    """A NaN stops ModelOpt's calibrator. Nothing is kept."""
    model = damaged_llama(tmp_path / "llama", "model.layers.1.self_attn.o_proj.weight", NAN)
    argv = ["--model", str(model), *SMALL, "--max-seq-len", "256", "--max-input-len", "128"]
    done = builder("build", *argv, "--output", str(tmp_path / "out"))
    assert done.returncode == 6, done.stderr
    assert "model.layers.1.self_attn.o_proj" in done.stderr
    assert "has 1 NaN" in done.stderr, done.stderr
    assert not list((tmp_path / "out" / "checkpoint").iterdir())


def test_sizes_that_nvfp4_cannot_hold_are_refused_before_any_work(tmp_path: Path) -> None:
    model = shutil.copytree(LLAMA, tmp_path / "llama")
    source = Tensors(LLAMA)
    tensors = []
    for name, info in source.items():
        shape = [120 if size == 128 and ".mlp." in name else size for size in info.shape]
        size = 2 * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        tensors.append(NewTensor(name, info.dtype, tuple(shape), [source.read(name)[:size]]))
    write(model / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 120}))
    done = builder("build", "--model", str(model), *SMALL, "--output", str(tmp_path / "out"))
    assert (done.returncode, "multiple of 16" in done.stderr) == (3, True), done.stderr
    assert "mlp.down_proj" in done.stderr


def test_an_architecture_without_a_tensorrt_llm_layout_is_refused_for_an_engine(tmp_path: Path) -> None:
    """...before calibration, while `quantize` still makes the unified layout of it."""
    argv = ["--model", "tests/data/arch-variants/gemma2", *SMALL, "--output", str(tmp_path)]
    done = builder("build", *argv)
    assert (done.returncode, "Gemma2ForCausalLM" in done.stderr) == (3, True), done.stderr
    assert not (tmp_path / "checkpoint").exists()


def test_code_that_comes_with_a_model_runs_only_when_asked(tmp_path: Path) -> None:
    model = shutil.copytree(LLAMA, tmp_path / "own-llama")
    (model / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    own = {"model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps({**config, **own}))
    argv = ["quantize", "--model", str(model), *SMALL, "--output", str(tmp_path / "out")]
    refused = builder(*argv)
    assert (refused.returncode, "--trust-remote-code" in refused.stderr) == (3, True), refused.stderr
    asked = builder(*argv, "--trust-remote-code", env={"HF_MODULES_CACHE": str(tmp_path / "code")})
    assert asked.returncode == 0, asked.stderr
    assert "14 linear layers in NVFP4" in asked.stderr
