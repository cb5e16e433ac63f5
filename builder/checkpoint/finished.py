"""The last part of a stage that makes a checkpoint: it is inspected while its files are hashed."""

from __future__ import annotations

from typing import Any

from builder.checkpoint import validate
from builder.core.hashes import Hashes


def inspected(hashes: Hashes) -> dict[str, Any]:
    """Inspects the checkpoint that this build made in `hashes.root`. Returns facts for the store.

    IntegrityError with the tensors' names if the inspection finds a problem.
    """
    hashes.add(hashes.root)
    found = validate.inspect(hashes.root, here=True)
    found.check()
    return {"inspection": found.facts(), "hashed": hashes.finish()}
