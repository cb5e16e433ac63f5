"""The last part of a stage that makes a checkpoint from its Hugging Face layout. Files are hashed meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.checkpoint import layouts, validate
from builder.core.hashes import Hashes


def write_second_layout(source_config: Mapping[str, Any], hashes: Hashes) -> str | None:
    """Writes `tensorrt_llm/` in `hashes.root`, beside `unified/`, if an engine serves the model. Returns why not.

    Begins to hash `unified/`, and hashes the weights while they are written. Raises what write_if_served raises.
    """
    unified, destination = hashes.root / "unified", hashes.root / "tensorrt_llm"
    hashes.add(unified)
    with hashes.following(destination / layouts.RANK_FILE) as done:
        return layouts.write_if_served(unified, source_config, destination, done)


def inspected(hashes: Hashes) -> dict[str, Any]:
    """Inspects the checkpoint that this build made in `hashes.root`. Returns facts for the store.

    IntegrityError with the tensors' names if the inspection finds a problem.
    """
    hashes.add(hashes.root)
    found = validate.inspect(hashes.root, here=True)
    found.check()
    return {"inspection": found.facts(), "hashed": hashes.finish()}
