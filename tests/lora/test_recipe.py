"""From --lora to the engine's flags and keys: what the recipe takes, what follows from it, what is rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from hub_server import Hub

from builder import pipeline
from builder.clean import removal
from builder.clean.reachability import Request
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.lora import tensors
from builder.lora.source import fetched, open_adapters
from builder.plan import Plan, plan
from builder.preflight.prepare import prepare
from builder.publish.combination import Change, change
from builder.recipe import schema
from builder.targets.base import flags_of
from builder.trtllm import flags as trtllm_flags

MODEL = Path(__file__).parents[1] / "data" / "tiny-qwen3"
QUIET = Output("quiet")


def resolved(*named: str, sets: tuple[str, ...] = (), **values: Any) -> schema.Resolved:
    asked = {"model.id": str(MODEL), "gpu": "cpu", "quantization.format": "fp8", "lora.adapters": list(named)}
    return schema.resolve({**asked, **values}, sets=sets)


def flags(tmp_path: Path, *named: str, **values: Any) -> dict[str, str]:
    prepared = prepare(resolved(*named, **values), Store(tmp_path / "store", QUIET, dry=True))
    return {flag.name: flag.value for flag in flags_of(prepared.settings)}


# ---- the recipe


def test_adapters_of_several_sources_add_up(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("lora:\n  adapters: {sql: a, law: b}\n  max_rank: 16\n")
    found = schema.resolve({"model.id": "m", "gpu": "cpu", "lora.adapters": ["law=c"]}, recipe_file=file)
    assert (found.recipe.lora.adapters, found.recipe.lora.max_rank) == ({"sql": "a", "law": "c"}, 16)
    assert found.origins["lora.adapters.law"] == "command line"


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (["sql"], "'sql' is not NAME=PLACE"),
        (["a:b=c"], "'a:b' can't name an adapter"),
        (["sql="], "the adapter sql has no directory"),
        (["sql=a", "sql=b"], "two adapters have the same name"),
    ],
)
def test_a_name_that_no_client_could_use_is_rejected(named: list[str], says: str) -> None:
    if says.startswith("two"):
        named = [*named, "no name"]
        says = "'no name' is not NAME=PLACE"
    with pytest.raises(UsageError, match=says):
        resolved(*named)


# ---- the flags


def test_the_engine_is_built_for_its_adapters(tmp_path: Path) -> None:
    one, two = adapters.write(tmp_path / "1", ["v_proj"]), adapters.write(tmp_path / "2", ["up_proj"], rank=6)
    found = flags(tmp_path, f"sql={one}", f"law={two}")
    wanted = ("auto", "attn_q attn_k attn_v mlp_gate", "6")
    assert tuple(found[name] for name in ("lora_plugin", "lora_target_modules", "max_lora_rank")) == wanted
    assert flags(tmp_path, f"sql={one}", **{"lora.max_rank": 32})["max_lora_rank"] == "32"
    with pytest.raises(UsageError, match=r"lora.max_rank is 2, and the largest of the adapters' ranks is 6"):
        flags(tmp_path, f"law={two}", **{"lora.max_rank": 2})
    assert "lora_plugin" not in flags(tmp_path)


def test_the_command_line_has_one_word_for_each_module() -> None:
    made = [trtllm_flags.Flag("lora_target_modules", "attn_q attn_k", "", "")]
    argv = trtllm_flags.command(made, checkpoint=Path("c"), output=Path("o"), timing_cache=Path("t"))
    assert argv[1:4] == ["--lora_target_modules", "attn_q", "attn_k"]


def test_the_engines_config_says_what_it_takes() -> None:
    version = trtllm_flags.load("1.2.1")
    values = {"max_batch_size": "8", "lora_plugin": "auto", "lora_target_modules": "attn_q", "max_lora_rank": "4"}
    made = [trtllm_flags.Flag(name, value, "", "") for name, value in values.items()]
    build = trtllm_flags.build_config(version, made, {"dtype": "bfloat16", "mapping": {"world_size": 1}})
    assert build["plugin_config"]["lora_plugin"] == "auto"
    assert (build["lora_config"]["lora_target_modules"], build["lora_config"]["max_lora_rank"]) == (["attn_q"], 4)


@pytest.mark.parametrize(("number_format", "rule"), [("nvfp4", "R41"), ("fp8_pc_pt", "R53")])
def test_formats_without_adapters_are_rejected_with_one_that_has(number_format: str, rule: str, tmp_path: Path) -> None:
    named = f"sql={adapters.write(tmp_path / 'sql')}"
    with pytest.raises(UnsupportedError, match="not support LoRA") as caught:
        flags(tmp_path, named, **{"quantization.format": number_format})
    assert rule in caught.value.why
    assert "--format fp8" in caught.value.hint


def test_layers_with_other_inputs_than_an_adapter_was_trained_on_are_refused(tmp_path: Path) -> None:
    """AWQ's scales are in the norm before q_proj, and not before down_proj; rotations are before all of them."""
    one, two = adapters.write(tmp_path / "1", ["q_proj"]), adapters.write(tmp_path / "2", ["down_proj", "o_proj"])
    awq: dict[str, Any] = {"quantization.format": "int4_awq", "gpu": "rtx4090", "target": "engine"}
    with pytest.raises(UnsupportedError, match="sql changes q_proj, whose inputs are scaled with"):
        flags(tmp_path, f"sql={one}", **awq)
    assert "lora_plugin" in flags(tmp_path, f"sql={two}", **awq)
    with pytest.raises(UnsupportedError, match="sql can't be served with rotated weights"):
        flags(tmp_path, f"sql={two}", **{"transform.name": "spinquant"})


def test_a_card_without_room_for_an_adapter_is_refused(tmp_path: Path) -> None:
    """The engine's cache of adapters is a share of what the weights leave, and the KV cache gets the rest."""
    named = f"sql={adapters.write(tmp_path / 'sql')}"
    share = "lora_cache_gpu_memory_fraction"

    def planned(fraction: str | None, *names: str) -> Plan:
        parameters = {share: fraction} if fraction else {}
        asked = resolved(*names, gpu="rtx4090", target="engine", **{"repository.parameters": parameters})
        return plan(asked, Store(tmp_path / "store", QUIET, dry=True))

    found = planned("0.000001", named)
    assert found.refusal is not None
    assert "The LoRA adapters do not fit on" in found.refusal.what
    assert f"--set repository.parameters.{share}=0.01" in found.refusal.hint
    fits, plain, all_of_it = planned(None, named), planned(None), planned("1", named)
    assert all_of_it.memory.cards[-1].kv_cache < plain.memory.cards[-1].kv_cache / 50
    assert fits.refusal is None
    assert any("sql (rank 4, q_proj, v_proj" in note.text for note in fits.notes)
    parameters = {one.name: one.value for one in fits.parameters}
    assert (parameters["lora_cache_max_adapter_size"], parameters[share]) == ("4", "0.05")
    with_adapters, without = (one.memory.cards[-1].kv_cache for one in (fits, plain))
    assert abs(with_adapters / without - 0.95) < 0.001


def test_a_place_that_is_neither_directory_nor_hub_id_is_rejected(tmp_path: Path) -> None:
    for place in ("./nowhere", "nowhere", "/no/where"):
        with pytest.raises(UsageError, match="which is no directory"):
            flags(tmp_path, f"sql={place}")


# ---- the Hub


def test_an_adapter_of_the_hub_is_pinned_and_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("someone/sql", adapters.write(tmp_path / "sql"))
    store = Store(tmp_path / "store", QUIET)
    [found] = open_adapters({"sql": "someone/sql"}, store=store)
    assert (found.commit, found.rank, found.modules) == (commit, 4, ["q_proj", "v_proj"])
    assert not any(one.path.endswith(".safetensors") and not one.header for one in hub.requests)
    [there] = fetched([found], store=store)
    assert there.pairs == found.pairs
    assert there.digest == open_adapters({"sql": str(tmp_path / "sql")}, store=store)[0].digest
    seen = len(hub.requests)
    [again] = open_adapters({"sql": f"someone/sql@{commit}"}, store=store)
    assert fetched([again], store=store)[0].digest == there.digest
    assert len(hub.requests) == seen


def test_a_repository_without_an_adapter_says_so(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    hub.add("someone/empty", tmp_path / "empty")
    with pytest.raises(UsageError, match="someone/empty is no LoRA adapter"):
        open_adapters({"sql": "someone/empty"}, store=Store(tmp_path / "store", QUIET))


# ---- the llmapi target


def test_the_llm_class_gets_the_same_adapters(tmp_path: Path) -> None:
    one = adapters.write(tmp_path / "sql")
    asked = {"gpu": "sm120", "target": "llmapi", "quantization.kv_cache_dtype": "auto", "lora.max_rank": 16}
    prepared = prepare(resolved(f"sql={one}", **asked), Store(tmp_path / "store", QUIET, dry=True))
    found = {one.name: one.value for one in prepared.settings}
    assert found["lora_config.lora_dir"] == [str(one)]
    assert found["lora_config.max_lora_rank"] == 16
    assert "lora_config.lora_target_modules" not in found, "the LLM class finds those of a single adapter"
    with pytest.raises(UsageError, match="from a directory of its name, and law is"):
        prepare(resolved(f"law={one}", **asked), Store(tmp_path / "store", QUIET, dry=True))
    twice = resolved(f"sql={one}", sets=(f"llmapi.args.lora_config.lora_dir=[{one}]",), **asked)
    with pytest.raises(UsageError, match="named twice"):
        prepare(twice, Store(tmp_path / "store", QUIET, dry=True))


LLM = {"gpu": "sm120", "target": "llmapi", "quantization.kv_cache_dtype": "auto"}


def test_several_adapters_of_the_llm_class_come_with_the_layers_that_they_change(tmp_path: Path) -> None:
    one, two = adapters.write(tmp_path / "sql", ["v_proj"]), adapters.write(tmp_path / "law", ["down_proj"])
    store = Store(tmp_path / "store", QUIET, dry=True)
    named = [f"sql={one}", f"law={two}"]
    found = {one.name: one.value for one in prepare(resolved(*named, **LLM), store).settings}
    assert found["lora_config.lora_target_modules"] == ["attn_q", "attn_k", "attn_v", "mlp_4h_to_h"]
    own = resolved(*named, sets=("llmapi.args.lora_config.lora_target_modules=[attn_v]",), **LLM)
    found = {one.name: one.value for one in prepare(own, store).settings}
    assert found["lora_config.lora_target_modules"] == ["attn_v"]
    bare = resolved(sets=(f"llmapi.args.lora_config.lora_dir=[{one},{two}]",), **LLM)
    with pytest.raises(UsageError, match="Several LoRA adapters need"):
        prepare(bare, store)


def test_the_llm_class_is_checked_for_what_it_takes_and_not_for_what_an_engine_takes(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", QUIET, dry=True)

    def taken(**config: Any) -> None:
        place = adapters.write(tmp_path / "sql", ["q_proj"], **config)
        prepare(resolved(f"sql={place}", **LLM), store)

    fused = {f"base_model.model.model.layers.0.mlp.gate_up_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    taken(changed=fused)
    inner = {f"base_model.model.language_model.layers.0.mlp.up_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    taken(changed=inner)
    taken(rank_pattern={"(a|b){1,9}": 4})  # its ranks are those of the tensors
    with pytest.raises(UnsupportedError, match="scales of single layers"):
        taken(alpha_pattern={"q_proj": 3})
    with pytest.raises(UnsupportedError, match="more than pairs of matrices") as caught:
        taken(use_dora=True)
    assert "LLM class" in caught.value.why
    with pytest.raises(UnsupportedError, match="tensors that TensorRT-LLM's LLM class does not take"):
        taken(changed={"base_model.model.lm_head.lora_A.weight": torch.ones(4, 4)})


# ---- keys


def test_an_adapter_that_changes_during_the_build_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither with the ranks of an earlier one, nor under the key of one."""
    place, store = adapters.write(tmp_path / "sql"), Store(tmp_path / "store", QUIET)
    found = open_adapters({"sql": str(place)}, store=store)
    adapters.write(place, lora_alpha=3)
    with pytest.raises(IntegrityError, match=r"The adapter sql in .* changed during the build"):
        fetched(found, store=store)
    write = tensors.write

    def write_and_change(*arguments: Any) -> None:
        write(*arguments)
        adapters.write(place, seed=9, lora_alpha=3)

    monkeypatch.setattr(tensors, "write", write_and_change)
    asked = resolved(f"sql={place}", **{"calibration.samples": 0, "quality.check": False})
    with pytest.raises(IntegrityError, match="files of an adapter changed while they were converted: sql"):
        pipeline.build(asked, store, until="repository")
    assert not list((store.root / "repository").glob("[!.]*"))


def test_the_repository_depends_on_the_content_and_the_engine_does_not(tmp_path: Path) -> None:
    place, store = adapters.write(tmp_path / "sql"), Store(tmp_path / "store", QUIET)
    asked = resolved(f"sql={place}", **{"calibration.samples": 0, "quality.check": False})
    first = pipeline.build(asked, store, until="repository")
    again = pipeline.build(asked, store, until="repository")
    adapters.write(place, seed=5)
    other = pipeline.build(asked, store, until="repository")
    assert first.engine
    assert other.engine
    assert first.repository
    assert again.repository
    assert other.repository
    assert first.engine.digest == other.engine.digest
    assert first.repository.path == again.repository.path != other.repository.path
    assert first.repository.facts["adapter_files"] != other.repository.facts["adapter_files"]
    config = json.loads((other.engine.path / "config.json").read_text())
    assert config["build_config"]["lora_config"]["max_lora_rank"] == 4


def test_the_plan_shows_an_adapter_that_is_still_to_be_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.add("someone/sql", adapters.write(tmp_path / "sql"))
    asked = resolved("sql=someone/sql", **{"calibration.samples": 0, "quality.check": False})
    dry = Store(tmp_path / "store", QUIET, dry=True)
    before = {stage: state for stage, state, _ in plan(asked, dry).stages}
    assert (before["engine"], before["adapter"], before["repository"]) == ("will run",) * 3
    pipeline.build(asked, Store(tmp_path / "store", QUIET), until="repository")
    after = {stage: state for stage, state, _ in plan(asked, Store(tmp_path / "store", QUIET, dry=True)).stages}
    assert (after["engine"], after["adapter"], after["repository"], after["smoke"]) == (*("cached",) * 3, "will run")


def test_clean_keeps_every_downloaded_adapter_of_a_repository_and_of_the_version_before(
    hub: Hub, tmp_path: Path
) -> None:
    """Nothing else leads to them, and without them the same build would need the Hub again."""
    names = ["sql", "law", "chat"]
    for seed, name in enumerate(names):
        hub.add(f"someone/{name}", adapters.write(tmp_path / name, seed=seed))
    quick = {"calibration.samples": 0, "quality.check": False, "name": "one"}
    for some in (names[:2], names[2:]):
        asked = resolved(*(f"{name}=someone/{name}" for name in some), **quick)
        store = Store(tmp_path / "store", QUIET)
        pipeline.build(asked, store, until="repository")
    there = set((store.root / "adapter").glob("[!.]*"))
    assert len(there) == 3
    made = removal.plan(store.root, Request(older_than=0))
    assert there <= {entry.path for entry in made.keep}
    both = change("both", Change({"one": store.root / "models" / "one"}), store=store)
    assert both.repository
    (store.root / "models" / "one").unlink()
    kept = {entry.path for entry in removal.plan(store.root, Request(older_than=0)).keep}
    assert len(there & kept) == 1, "that of the repository's only model"
