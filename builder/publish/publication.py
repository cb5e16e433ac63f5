"""Repository -> models/<name>: the link that people serve by, and the record of the build beside it."""

from __future__ import annotations

import os
from pathlib import Path

from builder.core.store import Store
from builder.preflight.prepare import Prepared
from builder.publish import build_record, links, versions
from builder.triton.repository import Repository


def publish(prepared: Prepared, repository: Repository, store: Store) -> Path:
    """Links the repository and writes its build record for `builder report`. Returns the link."""
    resolved = prepared.resolved
    with store.locked("publish", "models"):  # of two builds that want the same name one goes first
        name = links.link(resolved, repository.path, store)
        if not os.path.lexists(name):  # a record whose link is missing tells `clean` that the user removed the link
            links.move(name, repository.path)
        versions.remember(store.root, name, repository.path)
        build_record.write(prepared, link=name, source=links.source_of(resolved.recipe.model), store=store)
        links.move(name, repository.path)
    if name.name != (short := links.base_name(resolved.recipe, resolved.gpu.name)) and not resolved.recipe.name:
        store.out.info(f"models/{short} belongs to another build, so this one is models/{name.name}")
    return name
