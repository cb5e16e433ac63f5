"""The command line: what it imports, what it prints on which stream, and the exit code of each kind of failure."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from builder.cli import main, options
from builder.core import store
from builder.recipe import schema

MODEL = "tests/data/tiny-qwen3"


def run(*argv: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "builder", *argv], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload,no-any-return]


IMPORTS = """
import sys
from builder.cli import main as cli
try:
    cli.main(sys.argv[1:])
except SystemExit:
    pass
print("|".join(sorted(name for name in sys.modules if "." not in name)), file=sys.stderr)
"""


@pytest.mark.parametrize("argv", [["--help"], ["build", "--help"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS, *argv], capture_output=True, text=True)
    assert not {"torch", "transformers", "pydantic", "rich", "yaml", "numpy"} & set(done.stderr.split("|"))
    assert "usage: builder" in done.stdout


def test_plan_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    argv = ["plan", "--model", MODEL, "--gpu", "cpu", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", IMPORTS, *argv], capture_output=True, text=True)
    assert not {"torch", "transformers", "modelopt", "datasets"} & set(done.stderr.strip().split("|"))
    assert "will run" in done.stdout


def with_quality_check(stages: Sequence[str]) -> list[str]:
    """The quality check comes right after the checkpoint, before the stages that take long."""
    at = [*stages].index("checkpoint") + 1
    return [*stages[:at], "quality", *stages[at:]]


def test_plan_as_json_has_stages_sizes_values_and_flags(tmp_path: Path) -> None:
    done = run("plan", "--model", MODEL, "--gpu", "sm120", "--output", str(tmp_path), "--json")
    plan = json.loads(done.stdout)
    assert done.returncode == 0
    assert [row["stage"] for row in plan["stages"]] == with_quality_check(
        [s for s in store.STAGES if s not in ("transform", "layouts", "ranks")]
    )
    assert {row["state"] for row in plan["stages"]} == {"will run"}
    assert plan["values"]["model.id"] == {"value": MODEL, "from": "command line"}
    assert {flag["name"]: flag["value"] for flag in plan["flags"]}["context_fmha"] == "disable"
    assert plan["command"][0] == "trtllm-build"
    assert not any(tmp_path.iterdir())


def test_the_plan_of_a_sharded_model_has_one_more_stage(tmp_path: Path) -> None:
    argv = ["--model", MODEL, "--gpu", "sm120", "--output", str(tmp_path), "--json"]
    whole, split = (json.loads(run("plan", *argv, *more).stdout) for more in ([], ["--tp", "2", "--pp", "2"]))
    assert [row["stage"] for row in split["stages"]] == with_quality_check(
        [s for s in store.STAGES if s not in ("transform", "layouts")]
    )
    command = split["command"]
    assert command[command.index("--workers") + 1] == "4"
    assert command[command.index("--checkpoint_dir") + 1] == "RANKS/tensorrt_llm"
    ranks, checkpoint = sum(split["sizes"]["ranks"]), whole["sizes"]["checkpoint"]
    assert split["sizes"]["artifacts"] == whole["sizes"]["artifacts"] - checkpoint + 2 * ranks


def test_engine_with_dry_run_prints_the_command_ready_to_paste(tmp_path: Path) -> None:
    """Two quoted shell lines. A directory that does not exist yet has a placeholder, and stderr explains it."""
    output = tmp_path / "with space"
    argv = ["engine", "--dry-run", "--model", MODEL, "--gpu", "sm120", "--output", str(output)]
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    directory, command = map(shlex.split, done.stdout.splitlines())
    assert directory == ["mkdir", "-p", str(output / "timing")]
    plan = json.loads(run("plan", *argv[2:], "--json").stdout)
    assert command == plan["command"]
    assert command[-8:-2:2] == ["--checkpoint_dir", "--output_dir", "--input_timing_cache"]
    assert command[-7] == "CHECKPOINT/tensorrt_llm"
    assert "CHECKPOINT stands for a directory that does not exist yet: `builder quantize` creates it" in done.stderr
    assert "not on this machine: trtllm-build" in done.stderr
    said = json.loads(run(*argv, "--json").stdout)
    assert (said["command"], said["placeholder"]) == (command, "CHECKPOINT")
    assert [shlex.split(line) for line in said["shell"]] == [directory, command]
    assert said["flags"] == plan["flags"]
    assert not output.exists()


def test_engine_with_dry_run_for_the_reference_target(tmp_path: Path) -> None:
    argv = ["engine", "--dry-run", "--model", MODEL, "--gpu", "cpu", "--output", str(tmp_path)]
    done = run(*argv)
    assert (done.returncode, done.stdout) == (0, "")
    assert "The reference target runs no trtllm-build" in done.stderr
    assert "--gpu sm120" in done.stderr
    said = json.loads(run(*argv, "--json").stdout)
    assert (said["command"], said["shell"], said["target"]) == (None, [], "reference")
    assert "runs no trtllm-build" in said["why"]


def test_build_with_dry_run_is_plan(tmp_path: Path) -> None:
    argv = ["--model", MODEL, "--gpu", "cpu", "--output", str(tmp_path), "--json"]
    dry, plan = (json.loads(run(*command, *argv).stdout) for command in (["build", "--dry-run"], ["plan"]))
    assert dry.pop("machine").keys() == plan.pop("machine").keys()  # free memory and disk differ from run to run
    assert dry == plan


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["build", "--gpu", "cpu"], 2, "no model is named"),
        (["build", "--model", MODEL, "--gpu", "sm42"], 3, "no GPU profile or card named 'sm42'"),
        (["build", "--model", MODEL, "--gpu", "cpu", "--set", "engine.max_batchsize=8"], 2, "engine.max_batch_size"),
        (["build", "--model", MODEL, "--gpu", "cpu", "--set", "nonsense"], 2, "not of the form"),
        (["build", "--model", "no/such/directory/", "--gpu", "cpu"], 2, "neither a directory nor a Hub id"),
        (["build", "--model", "../../../../../../../../etc", "--gpu", "cpu"], 2, "/etc has no config.json"),
        (["build", "--model", MODEL, "--gpu", "cpu", "--recipe", "absent.yaml"], 2, "Can't read the recipe"),
        (["build", "--model", MODEL, "--gpu", "sm120"], 3, "trtllm-build is not on this machine's PATH"),
        (["build", "--model", MODEL, "--gpu", "cpu", "--max-seq-len", "99999"], 3, "2048 positions"),
        (["build", "--model", MODEL, "--gpu", "cpu", "--calib-data", "absent.jsonl"], 2, "absent.jsonl"),
        (["inspect", "tests/data/eval"], 2, ""),
        (["serve", "tests/data"], 2, ""),
        (["verify", "--output", "no-such-directory"], 2, "There is no directory no-such-directory"),
        (["clean", "--output", "no-such-directory"], 2, "There is no directory no-such-directory"),
        (["bild"], 2, "invalid choice"),
    ],
)
def test_bad_input_gets_a_message_and_its_exit_code(tmp_path: Path, argv: list[str], code: int, message: str) -> None:
    if argv[0] == "build":
        argv = [*argv, "--output", str(tmp_path / "out")]
    done = run(*argv, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)})
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_an_unwritable_output_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("build", "--model", MODEL, "--gpu", "cpu", "--output", str(tmp_path / "file" / "out"))
    assert (done.returncode, "Can't write" in done.stderr) == (2, True), done.stderr


def test_json_includes_the_error(tmp_path: Path) -> None:
    done = run("build", "--model", "./absent", "--gpu", "cpu", "--output", str(tmp_path), "--json")
    assert json.loads(done.stdout)["exit_code"] == 2
    assert done.returncode == 2


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    done = run("fetch", "-q", "--model", MODEL, "--gpu", "cpu", "--output", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_fetch_verify_and_clean(tmp_path: Path) -> None:
    out = ["--output", str(tmp_path)]
    fetched = run("fetch", "--model", MODEL, "--gpu", "cpu", *out)
    assert fetched.returncode == 0, fetched.stderr
    directory = Path(fetched.stdout.strip())
    again = run("fetch", "--model", MODEL, "--gpu", "cpu", *out)
    assert "nothing to do: every stage is cached" in again.stderr
    assert run("verify", *out).returncode == 0
    manifest = directory / "manifest.json"
    whole = manifest.read_text()
    for edited in (whole.replace('"model_id"', '"model-id"'), whole.replace('"sha256": "', '"sha256": "0', 1)):
        manifest.write_text(edited)
        assert run("verify", *out).returncode == 6
    assert "left alone" in run("clean", "--all", *out).stderr
    manifest.write_text(whole)
    assert run("clean", *out).returncode == 0
    assert run("clean", "--dry-run", "--older-than", "0", *out).returncode == 0
    assert directory.exists()
    assert run("clean", "--older-than", "0", *out).returncode == 0
    assert not directory.exists()


def test_gpus_and_schema() -> None:
    title, header, first, *_ = run("gpus").stdout.splitlines()
    columns = ["profile", "default", "runs (engine)", "runs (llmapi)", "KV cache (engine)", "KV cache (llmapi)", "for"]
    assert (title, header.split("\t")) == ("# GPU profiles", columns)
    assert first.startswith("cpu\tnvfp4\t-\t-\t-\t-\tno GPU")
    committed = Path("configs/recipe.schema.json").read_text()
    assert run("schema").stdout == committed


def test_gpus_as_json_has_formats_and_cards() -> None:
    found = json.loads(run("gpus", "--json").stdout)
    assert found["sm120"]["sm"] == 120
    assert found["sm120"]["formats"]["nvfp4"]["engine"]["source"]
    assert found["sm120"]["cards"][0]["name"] == "RTX 5090"
    assert "nvfp4" not in found["sm90"]["formats"]


def test_gpus_lists_what_a_recipe_can_choose() -> None:
    """Formats and schemes by the names of --format, and caches by those of --kv-cache-dtype."""
    found = json.loads(run("gpus", "--json").stdout)
    for name, profile in found.items():
        for target, formats in profile["choices"]["format"].items() if name != "cpu" else ():
            assert "bf16" in formats
            assert ("nvfp4-fp8_attention" in formats) == ("nvfp4" in formats)
            assert ("int4_awq_64" in formats) == ("int4_awq" in formats)
            caches = profile["choices"]["kv_cache_dtype"][target]
            for key, choices in (("quantization.format", formats), ("quantization.kv_cache_dtype", caches)):
                for choice in choices:
                    schema.resolve({"model.id": "m", "gpu": name, "target": target, key: choice})
    assert found["sm120"]["choices"]["kv_cache_dtype"] == {"engine": ["fp8", "auto"], "llmapi": ["fp8", "auto"]}
    assert "nvfp4" in found["sm100"]["choices"]["kv_cache_dtype"]["llmapi"]


def test_explain_as_tables_and_as_json() -> None:
    text = run("explain", "use_fused_mlp").stdout
    assert "1.2.1\tenable\tenable, disable" in text
    assert "R40\t" in text
    assert json.loads(run("explain", "gemm_plugin", "--json").stdout)["rules"][0]["id"] == "R33"
    unknown = run("explain", "contxt_fmha")
    assert (unknown.returncode, "Did you mean --context_fmha" in unknown.stderr) == (2, True)


def test_the_plan_notes_what_the_flags_cost(tmp_path: Path) -> None:
    done = run("plan", "--model", MODEL, "--gpu", "sm120", "--output", str(tmp_path), "--json")
    notes = {note["rule"]: note["text"] for note in json.loads(done.stdout)["notes"]}
    assert "no KV cache reuse between requests, no chunked context" in notes["R26"]
    refused = run("plan", "--model", MODEL, "--gpu", "sm89", "--format", "nvfp4", "--output", str(tmp_path))
    assert (refused.returncode, "sm89 can't run NVFP4" in refused.stderr) == (3, True)


def test_the_plan_warns_of_an_fp8_cache_for_an_attention_bias_without_qk_norm(tmp_path: Path) -> None:
    argv = ["plan", "--model", "tests/data/arch-variants/qwen2", "--gpu", "cpu", "--output", str(tmp_path)]
    argv += ["--max-seq-len", "256", "--max-input-len", "128"]
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert "qwen2 has an attention bias and no QK norm" in done.stderr
    assert "--compare-kv" in done.stderr
    assert "QK norm" not in run(*argv, "--kv-cache-dtype", "auto").stderr


def test_the_plan_of_a_gated_build_includes_its_evaluation(tmp_path: Path) -> None:
    argv = ["plan", "--model", MODEL, "--gpu", "cpu", "--output", str(tmp_path), "--json"]
    plain, gated = (json.loads(run(*argv, *more).stdout)["stages"] for more in ([], ["--min-score", "98"]))
    assert gated[:-1] == [row for row in plain if row["stage"] != "quality"], "the gate takes the check's place"
    assert gated[-1]["stage"] == "evaluation"
    assert gated[-1]["why"] == "a gate (score 98): its input comes from snapshot"


@pytest.mark.parametrize("command", ["build", "quantize", "eval", "sensitivity"])
def test_every_measurement_can_be_forced(command: str) -> None:
    names = [*options.STAGE_NAMES, *options.MEASUREMENTS]
    argv = [word for name in names for word in ("--force", name)]
    forced = options.forced_stages(main.parser().parse_args([command, "--model", MODEL, *argv]))
    assert forced >= set(store.STAGES) | {"texts", "scores", "sensitivity", "proxy", "parts", "selection"}
    assert forced <= {*store.STAGES, *store.EVALUATION}


def test_help_shows_the_exit_codes_and_examples() -> None:
    text = main.parser().format_help()
    assert "builder build --model Qwen/Qwen3-8B --gpu sm120" in text
    assert "130 interrupted" in text


def test_a_hint_names_only_flags_that_exist() -> None:
    """Every flag in the hint of an error must be one that a command accepts."""
    commands = next(a for a in main.parser()._actions if a.dest == "command").choices or {}
    known = {option for command in commands.values() for action in command._actions for option in action.option_strings}
    # of pip, docker run, tritonserver, hf download, ray job submit and mlflow
    known |= {"--no-deps", "--ulimit", "--shm-size", "--model-repository", "--local-dir", "--working-dir"}
    known |= {"--experiment-id"}
    wrong = []
    for file in Path("builder").rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            for hint in (word.value for word in call.keywords if word.arg == "hint"):
                texts = [n.value for n in ast.walk(hint) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                flags = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+(?![\w-]*_)", " ".join(texts))
                wrong += [f"{file}: {flag}" for flag in flags if flag not in known]
    assert not wrong


@pytest.mark.parametrize(("before", "after"), [("SIG_DFL", "True"), ("SIG_IGN", "False")])
def test_a_closed_terminal_interrupts_unless_it_is_ignored(before: str, after: str) -> None:
    """nohup makes a program ignore SIGHUP, and that must stay so."""
    code = f"""
import signal
from builder.cli import main as cli
from builder.core import interrupts
signal.signal(signal.SIGHUP, signal.{before})
cli.main(["gpus", "--quiet"])
print(signal.getsignal(signal.SIGHUP) is interrupts.interrupt)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == after
