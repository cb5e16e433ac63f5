"""Several repositories -> one Repository that serves all of their models, each under a name of its own.

The Triton models of a member are called MODEL_tensorrt_llm, MODEL_preprocessing and so on, because Triton requires
unique names. Files are copied; only names, references to them and the share of the KV cache change in the
configurations. Facts of a member are under `members` in the repository's facts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.store import Store, sources_digest
from builder.lora import cache
from builder.triton.lint.run import lint
from builder.triton.repository import Repository
from builder.trtllm import compatibility

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FRACTION = "kv_cache_free_gpu_mem_fraction"  # of the C++ backend
LLM_FRACTION = "free_gpu_memory_fraction"  # of the LLM class, in 1/model.yaml
DEFAULT_FRACTION = 0.9  # of both (kvCacheConfig.h@1.2.1, llmapi/llm_args.py@1.2.1)
# Parameters whose values name a model, and those whose values begin with the directory of one.
REFERENCES = ("preprocessing_model_name", "tensorrt_llm_model_name", "tokenizer_dir")
CONFIG, ARGUMENTS = "config.pbtxt", "1/model.yaml"


@dataclass(frozen=True)
class Member:
    """A model of a combined repository. link: the name in models/ that its repository had. fraction: of the GPU's free
    memory, for its KV cache; None keeps its own."""

    repository: Repository
    link: str
    fraction: float | None = None


def combine(members: Mapping[str, Member], *, store: Store) -> Repository:
    """The repository that serves these models, by the names that clients use.

    UsageError for a name that can't be used, UnsupportedError for members that can't share a server.
    """
    check_names(members)
    check_compatible({name: member.repository for name, member in members.items()})
    ingredients = {
        "members": {
            # The digest leads to what a member was made from; the key covers what its digest does not.
            name: {"repository": member.repository.digest, "key": member.repository.path.name,
                   "link": member.link, "fraction": member.fraction}
            for name, member in sorted(members.items())
        },
        "sources": sources_digest(
            "builder/triton/combined.py", "builder/triton/repository.py", "builder/triton/lint",
            "builder/trtllm/compatibility.py",
        ),
    }  # fmt: skip

    def make(directory: Path) -> Mapping[str, Any]:
        return write(directory / "models", members)

    artifact = store.stage("repository", ingredients, make)
    return Repository(artifact.path, artifact.digest, artifact.facts)


def write(models: Path, members: Mapping[str, Member]) -> dict[str, Any]:
    """Writes all models into `models`, checks them, and returns the facts of the repository.

    IntegrityError if the result is not a valid repository.
    """
    models.mkdir(parents=True)
    facts = {}
    for name, member in sorted(members.items()):
        prefix = f"{name}_"
        sources = [path for path in sorted(member.repository.models.iterdir()) if path.is_dir()]
        own = {path.name for path in sources}
        for source in sources:
            target = models / f"{prefix}{source.name}"
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            text = _renamed((source / CONFIG).read_text(encoding="utf-8"), prefix, own)
            (target / CONFIG).write_text(text, encoding="utf-8")
            if member.fraction is not None:
                _set_fraction(target, member.fraction)
        facts[name] = _facts(member, prefix)
    found = lint(models)
    if found.errors:
        wrong = [f"{one.file}:{one.line}: {one.what}" for one in found.findings if one.severity == "error"]
        raise IntegrityError(
            "The combined repository is invalid.",
            why="\n".join(wrong[:10]),
            hint="See what is wrong with its members: builder lint artifacts/models/NAME",
        )
    first = next(iter(facts.values()))
    return {"target": first["target"], "tensorrt_llm": first["tensorrt_llm"], "world_size": 1, "members": facts}


def check_names(names: Mapping[str, object]) -> None:
    """UsageError for a name that no Triton model and no directory can have, or that differs from another by case."""
    for name in names:
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} can't be the name of a model.",
                why="It becomes part of the names of Triton's models: at most 100 letters, digits and . _ -",
                hint="Name it: --add REPOSITORY=MODEL",
            )
    folded: dict[str, str] = {}
    for name in names:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise UsageError(f"{name} and {other} differ by case only.", hint="Name one of them otherwise.")


@dataclass(frozen=True)
class Kind:
    """What models of one server have in common. ranks: 1 for each of them. sm: the GPU that the engine was built for;
    None for what runs on any."""

    target: str
    tensorrt_llm: str
    ranks: int = 1
    sm: int | None = None


def check_compatible(members: Mapping[str, Repository]) -> None:
    """UnsupportedError for members that one server can't serve."""
    check_kinds({name: kind_of(repository) for name, repository in members.items()})


def kind_of(repository: Repository) -> Kind:
    """What a server must be to serve this repository."""
    facts = repository.facts
    return Kind(
        str(facts.get("target")), str(facts.get("tensorrt_llm")), int(facts.get("world_size") or 1), _card(repository)
    )


def check_kinds(kinds: Mapping[str, Kind]) -> None:
    """UnsupportedError for models that one server can't serve."""
    for name, kind in kinds.items():
        if kind.ranks > 1:
            raise UnsupportedError(
                f"{name} has {kind.ranks} ranks, and a repository of several models takes models of one rank.",
                why="Each rank is a Triton server of its own, with the ranks of one engine.",
                hint=f"Serve {name} from its own repository, or build it with --tp 1 --pp 1.",
            )
    for fact, title in (("target", "target"), ("tensorrt_llm", "TensorRT-LLM version")):
        found = {name: str(getattr(kind, fact)) for name, kind in kinds.items()}
        if len(set(found.values())) > 1:
            raise UnsupportedError(
                f"The models have more than one {title}: {', '.join(f'{k} {v}' for k, v in found.items())}.",
                why="One server runs one version of TensorRT-LLM and one backend for all engines.",
                hint="Build them for the same: --set engine.tensorrt_llm=VERSION, --target TARGET",
            )
    cards = {name: kind.sm for name, kind in kinds.items() if kind.sm}
    if len(set(cards.values())) > 1:
        raise UnsupportedError(
            f"The engines were built for different GPUs: {', '.join(f'{k} sm{v}' for k, v in cards.items())}.",
            why="A TensorRT engine runs only on the architecture that it was built for.",
            hint="Build them for the same GPU: --gpu GPU",
        )


def fraction_of(member: Member) -> float:
    """The share of the GPU's free memory that its KV cache takes."""
    if member.fraction is not None:
        return member.fraction
    models = member.repository.models / compatibility.ENGINE_MODEL
    for file, pattern in (
        (models / ARGUMENTS, rf"(?m)^\s*{LLM_FRACTION}: (.*)$"),
        (models / CONFIG, rf'key: "{FRACTION}" value: {{ string_value: "([^"]*)'),
    ):
        if file.is_file() and (found := re.search(pattern, file.read_text(encoding="utf-8"))):
            return float(found[1])
    return DEFAULT_FRACTION


def adapters_of(member: Member) -> tuple[float, int]:
    """The share of the GPU's free memory that an engine's LoRA adapters take, and the bytes of the largest one."""
    served = compatibility.read_served(member.repository.models)
    if served is None:
        return 0.0, 0
    config = compatibility.read_engine(served.engine).config
    build = config.get("build_config") or {}
    if not cache.has_adapters(build):
        return 0.0, 0
    fraction = served.parameters.get(cache.GPU_FRACTION_KEY, cache.GPU_FRACTION)
    return float(fraction), cache.largest(build, config["pretrained_config"])


def _card(repository: Repository) -> int | None:
    served = compatibility.read_served(repository.models)
    return compatibility.read_engine(served.engine).built_with.get("sm") if served else None


def _set_fraction(model: Path, fraction: float) -> None:
    """Writes the share of the KV cache into the model's files that have one."""
    for name, pattern in ((CONFIG, rf'(key: "{FRACTION}" value: {{ string_value: ")[^"]*'),
                          (ARGUMENTS, rf"(?m)^(\s*{LLM_FRACTION}: ).*$")):  # fmt: skip
        if (model / name).is_file():
            text = (model / name).read_text(encoding="utf-8")
            (model / name).write_text(re.sub(pattern, rf"\g<1>{fraction}", text), encoding="utf-8")


def _renamed(text: str, prefix: str, own: set[str]) -> str:
    """A configuration with the prefix before its own name and before the names of the member's other models."""

    def replaced(match: re.Match[str]) -> str:
        model = match["value"].partition("/")[0]
        return match["before"] + prefix * (model in own) + match["value"]

    references = "|".join(REFERENCES)
    for pattern in (
        r'(?m)^(?P<before>name: ")(?P<value>[^"]*)',
        r'(?m)^(?P<before>\s+model_name: ")(?P<value>[^"]*)',
        rf'(?P<before>key: "(?:{references})" value: {{ string_value: ")(?P<value>[^"]*)',
    ):
        text = re.sub(pattern, replaced, text)
    return text


def _facts(member: Member, prefix: str) -> dict[str, Any]:
    facts = dict(member.repository.facts)
    facts["models"] = {use: f"{prefix}{model}" for use, model in facts["models"].items()}
    if "tokenizer_dir" in facts:
        facts["tokenizer_dir"] = f"{prefix}{facts['tokenizer_dir']}"
    return {
        **facts,
        "prefix": prefix,
        "repository": member.repository.path.name,
        "link": member.link,
        "fraction": member.fraction,
    }
