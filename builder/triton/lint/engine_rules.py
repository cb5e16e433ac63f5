"""Values in config.pbtxt that the engine's own config.json contradicts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import ModelFiles
from builder.triton.lint.parameter_rules import is_unset
from builder.triton.lint.positions import Field
from builder.trtllm import compatibility
from builder.trtllm.compatibility import ENGINE_MODEL, Runtime
from builder.trtllm.mismatch import STREAMING, Mismatch
from builder.trtllm.references import resolved

PATH = "gpt_model_path"


def check(engine_model: ModelFiles, engine: Path) -> Iterator[Finding]:
    """All of them. engine: its directory, which may have another path than where it is served."""
    served = compatibility.read_served(engine_model.directory.parent, engine_model.name.removesuffix(ENGINE_MODEL))
    if served is None:
        return
    facts = compatibility.read_engine(engine)
    for one in compatibility.mismatches(served, facts, Runtime()):
        if one.about != STREAMING:  # which streaming_rules.py checks
            what = one.what.replace(f" in {served.file}", "").replace(f"{served.file} declares", "it declares")
            fix = one.hint.replace(compatibility.RENDER, "").strip().replace("that file", engine_model.file)
            at = _place(engine_model, one)
            yield engine_model.finding("engine", at, f"{what.rstrip('.')}: {one.why}".rstrip("."), fix)


def directory(engine_model: ModelFiles, named: Path | None) -> Path | None:
    """The engine to compare with: the one that the user names, or the model's own, if its config.json can be read."""
    path = engine_model.parameters.get(PATH, "")
    named_so = engine_model.name == ENGINE_MODEL or engine_model.name.endswith(f"_{ENGINE_MODEL}")
    own = resolved(path, engine_model.directory) if named_so and not is_unset(path) else None
    found = named or own
    return found if found is not None and (found / "config.json").is_file() else None


def _place(model: ModelFiles, one: Mismatch) -> Field | None:
    """The field that the sentence begins with, or the first tensor that it names."""
    words = one.what.replace(",", " ").split()
    for word in words:
        found = model.parameter(word) or model.text.first(word) or model.tensor("input", word)
        if found := found or model.tensor("output", word):
            return found
    return model.parameter(PATH)
