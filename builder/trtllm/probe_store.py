"""The answers of probes, as files: one for each container and GPU architecture. Reading them needs no GPU.

    <root>/probes/tensorrt_llm-1.2.1-tensorrt-10.14.1.48-sm120.json

A file may be copied from the machine with the card to the machine that plans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError
from builder.core.store import library_versions, replace_file
from builder.core.untrusted_text import parse_json, read_regular
from builder.machine import containers
from builder.recipe import schema
from builder.recipe.target_facts import target_facts
from builder.trtllm import probe_results
from builder.trtllm import versions as trtllm_versions
from builder.trtllm.probe_results import Answer, Probe


@dataclass(frozen=True)
class Container:
    """The versions and the GPU architecture that an answer is valid for."""

    tensorrt_llm: str
    tensorrt: str
    sm: int

    @property
    def name(self) -> str:
        """The file's name without suffix."""
        return f"tensorrt_llm-{self.tensorrt_llm}-tensorrt-{self.tensorrt}-sm{self.sm}"

    def file(self, root: Path) -> Path:
        """The file with its answers."""
        return root / "probes" / f"{self.name}.json"


def answers(resolved: schema.Resolved, root: Path) -> list[Answer]:
    """The probe answers for the recipe's card and container, in the order of the probes.

    The container is the current one or, outside a container, the one in configs/containers.yaml for the version.
    """
    sm, wanted = resolved.gpu.sm, resolved.recipe.engine.tensorrt_llm
    if not target_facts(resolved.recipe.target).builds_tensorrt or sm is None:
        return []
    version = trtllm_versions.load(wanted)
    tensorrt = library_versions("tensorrt")["tensorrt"]
    if tensorrt != "absent":
        files = [Container(wanted, tensorrt, sm).file(root)]
    else:
        tensorrt = next((row.tensorrt for row in containers.rows() if row.tensorrt_llm == wanted and row.tensorrt), "")
        files = sorted((root / "probes").glob(f"tensorrt_llm-{wanted}-tensorrt-{tensorrt}*-sm{sm}.json"))
    found = []
    for file in files[-1:]:
        kept = read(file)
        for probe in probe_results.probes(version, sm):
            record = kept.get(probe.name)
            if record and holds(record, probe):
                container = file.stem.partition("-tensorrt-")[2].rpartition("-sm")[0]
                built = f"{record['card']} with TensorRT-LLM {wanted}, TensorRT {container}, on {record['date']}"
                found.append(Answer(probe, sm, record["outcome"], record["reason"], built, str(file)))
    return found


def holds(record: Mapping[str, Any], probe: Probe) -> bool:
    """Whether the record answers the probe as probes.yaml defines it now."""
    return bool(record["asked"] == probe.asked())


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by probe name; {} if there is no file. IntegrityError for any other content."""
    try:
        kept: dict[str, dict[str, Any]] = parse_json(read_regular(file))["answers"]
        texts = [record[key] for record in kept.values() for key in ("outcome", "reason", "card", "date")]
        if not all(isinstance(text, str) for text in texts) or not all(record["asked"] for record in kept.values()):
            raise ValueError("an answer does not have the fields that a probe writes")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{file} is not a file of probe answers.",
            why=str(error),
            hint="Remove it, then: builder probe",
        ) from error
    return kept


def keep(root: Path, container: Container, probe: Probe, record: Mapping[str, Any]) -> None:
    """Adds an answer to the file atomically. The caller holds the lock, so that no answer is lost."""
    path = container.file(root)
    content = {**vars(container), "answers": {**read(path), probe.name: record}}
    replace_file(path, json.dumps(content, indent=1))
