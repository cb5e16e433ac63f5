"""Engine -> Repository: renders a Triton model repository for an engine, and opens finished repositories."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core import manifest as manifests
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.store import MANIFEST, Artifact, Store, library_versions, read, sources_digest
from builder.grammar import vocabulary
from builder.model.files import json_object
from builder.recipe import schema
from builder.recipe.target_facts import ENGINE, REFERENCE
from builder.tokenizer import files as tokenizer_files
from builder.triton import adapter_files, engine_parameters, guided_decoding, model_config, stream_capacity
from builder.triton.template_values import TOKENIZER_DIR, template_files, template_values, text_facts
from builder.trtllm import compatibility, references

if TYPE_CHECKING:
    from builder.hub.snapshot import Snapshot
    from builder.lora.adapter import Adapter
    from builder.trtllm.engine import Engine

SAME_CODE = {"ensemble_infer": "tensorrt_llm_bls"}  # a model -> the model whose model.py it runs


@dataclass(frozen=True)
class Repository:
    """A Triton model repository. `models` is the directory that Triton serves; `facts` is what clients need to know."""

    path: Path
    digest: str
    facts: Mapping[str, Any]

    @property
    def models(self) -> Path:
        """The directory that Triton serves."""
        return self.path / "models"

    @property
    def members(self) -> Mapping[str, Mapping[str, Any]]:
        """The facts of each model that clients can choose, by its name; "" is that of the only one (combined.py)."""
        found: Mapping[str, Mapping[str, Any]] = self.facts.get("members") or {"": self.facts}
        return found

    def path_of(self, fact: str) -> Path:
        """The absolute path of what a fact refers to: `engine` or `checkpoint`."""
        return references.resolved(str(self.facts[fact]), self.path)

    def check_single(self, command: str) -> None:
        """UsageError if there are several models, for a command that takes one."""
        if "" not in self.members:
            links = [str(facts["link"]) for facts in self.members.values()]
            raise UsageError(
                f"builder {command} takes a repository of one model, and {self.path} has {', '.join(self.members)}.",
                hint=f"Name the repository of one of them: {', '.join(f'artifacts/models/{link}' for link in links)}.",
            )


def render(
    engine: Engine,
    snapshot: Snapshot,
    part: schema.Repository,
    adapters: Sequence[Adapter] = (),
    *,
    store: Store,
) -> Repository:
    """The model repository that serves this engine with this model's tokenizer. `part` is the recipe's `repository`.

    UnsupportedError for a TensorRT-LLM version without templates or a model without tokenizer.json, UsageError for a
    setting that the engine does not support, IntegrityError if the rendered files are invalid.
    """
    templates, tensors = template_files(engine.config["version"])
    named = adapter_files.ingredients(adapters)
    ingredients = {
        "engine": engine.digest,
        "engine_path": references.relative(store.place(engine.path), store.root),
        "snapshot": snapshot.digest,
        "part": part.model_dump(mode="json"),
        **named,
        "libraries": library_versions("jinja2"),
        "sources": sources_digest(
            "builder/triton/repository.py",
            "builder/triton/adapter_files.py",
            "builder/lora",
            "builder/triton/model_config.py",
            "builder/triton/engine_parameters.py",
            "builder/triton/guided_decoding.py",
            "builder/triton/sampling_tensors.py",
            "builder/triton/stream_capacity.py",
            "builder/triton/template_values.py",
            "builder/trtllm/compatibility.py",
            "builder/trtllm/mismatch.py",
            "builder/trtllm/references.py",
            "builder/trtllm/parameter_rules.py",
            "builder/grammar",
            "builder/recipe/triton_parameters.py",
            "builder/model/files.py",
            "builder/model/multimodal.py",
            "builder/tokenizer/files.py",
            "builder/tokenizer/sampling_defaults.py",
            "builder/tokenizer/special_ids.py",
            templates,
            model_config.MACROS,
            tensors,
        ),
    }

    def make(directory: Path) -> Mapping[str, Any]:
        facts = write(directory / "models", engine.path.resolve(), snapshot.path, part, adapters)
        snapshot.source.check_unchanged()  # the tokenizer is copied from it
        adapter_files.check_unchanged(adapters, named)
        return facts

    return _repository(store.stage("repository", ingredients, make))


def open_repository(path: Path) -> Repository:
    """A finished repository, by its directory or a link to it.

    UsageError if `path` is not a finished repository, IntegrityError if its files were changed.
    """
    directory = Path(path).resolve()
    artifact = read(directory)
    if artifact is None and (directory / MANIFEST).is_file():
        compatibility.check(directory / "models")  # a mismatch with the engine is the better message
        raise _changed(directory, "Render it again: the same `builder build` command with --from render")
    if artifact is None or artifact.stage != "repository":
        raise UsageError(
            f"{path} is not a finished repository.", hint="Build one: builder build --model MODEL --gpu GPU"
        )
    return _repository(artifact)


def check_served(repository: Repository) -> None:
    """IntegrityError if the engine or checkpoint that the repository serves is in a store and was changed there."""
    parts = (("engine", "", "engine"), ("checkpoint", "unified", "quantize"))
    for facts, (name, below, stage) in ((facts, part) for facts in repository.members.values() for part in parts):
        if name not in facts:
            continue
        served = references.resolved(str(facts[name]), repository.path)
        directory = served.parent if below and served.name == below else served
        if (directory / MANIFEST).is_file() and read(directory) is None:
            compatibility.check(repository.models)
            raise _changed(directory, f"Make it again: the same `builder build` command with --from {stage}")


def _changed(directory: Path, hint: str) -> IntegrityError:
    try:
        wrong = list(manifests.file_problems(directory, manifests.load(directory), hashed_up_to=manifests.SMALL))
    except manifests.Damaged as error:
        wrong = [f"its {MANIFEST}: {error}"]
    return IntegrityError(
        f"The files of {directory} were changed, added or removed after the build.",
        why="\n".join(wrong[:10]),
        hint=hint,
    )


def find(root: Path, named: str | None = None) -> Path:
    """The repository in root/models to use if no path was given: the one called `named`, or else the only one."""
    published = sorted(path for path in (root / "models").glob("*") if not path.name.startswith("."))
    found = [path for path in published if named in (None, "", path.name)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in published)
    hint = "Build one first: builder build --model MODEL --gpu GPU"
    if published:
        hint = f"Choose one: MODEL_REPOSITORY={published[0].name}, or give its path"
    problem = f"no repository {named!r}" if named else "more than one repository" if published else "no repository"
    raise UsageError(f"{root / 'models'} contains {problem}.", why=f"It contains {names}." if names else "", hint=hint)


def write(
    models: Path, engine: Path, snapshot: Path, part: schema.Repository, adapters: Sequence[Adapter] = ()
) -> dict[str, Any]:
    """Renders every model into `models`, checks them, and returns the repository's facts.

    `engine` and `snapshot` are the directories of the engine and of the model's files. Errors as for `render`.
    """
    _check_tokenizer(snapshot)
    config = json_object(engine / "config.json")
    texts = text_facts(snapshot, part)
    vocab_size = config["pretrained_config"]["vocab_size"]
    stops = guided_decoding.stop_token_ids(snapshot, texts["end_ids"], vocab_size)
    guided = guided_decoding.check(part, config, stops)
    reference = references.relative(engine, models / compatibility.ENGINE_MODEL)
    values = template_values(reference, config, texts, part, guided=guided)
    templates, _ = template_files(config["version"])
    for source in sorted(path.parent for path in templates.glob("*/config.pbtxt.j2")):
        if source.name == "ensemble_infer" and not part.decoupled:
            continue
        model = models / source.name
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(model_config.render(source, values), encoding="utf-8")
        code = templates / SAME_CODE.get(source.name, source.name) / "1" / "model.py"
        if code.is_file():
            shutil.copyfile(code, model / "1" / "model.py")
    (models / TOKENIZER_DIR).mkdir(parents=True)
    tokenizer_files.copy(snapshot, models / TOKENIZER_DIR)
    if guided:
        vocabulary.write(
            models / TOKENIZER_DIR, models / compatibility.ENGINE_MODEL / guided_decoding.FILE, vocab_size, stops
        )
    adapter_facts = adapter_files.write(models / compatibility.ENGINE_MODEL, adapters, config)
    model_config.check(models, max_batch_size=values["max_batch_size"], decoupled=part.decoupled)
    facts = {
        **_facts(engine, config, texts, part),
        "engine": references.relative(engine, models.parent),
        **adapter_facts,
    }
    if guided:
        facts["guided_decoding"] = {"file": guided_decoding.FILE, "stop_token_ids": stops}
    return facts


def repository_key(repository: Repository) -> str:
    """The key that tests and measurements of a served repository depend on, besides its digest.

    The repository's files contain the engine's path; only the key covers the engine's content.
    """
    return repository.path.name


def _repository(artifact: Artifact) -> Repository:
    return Repository(artifact.path, artifact.digest, artifact.facts)


def _facts(
    engine: Path, config: Mapping[str, Any], texts: Mapping[str, Any], part: schema.Repository
) -> dict[str, Any]:
    build = config["build_config"]
    return {
        "target": (ENGINE if list(engine.glob("*.engine")) else REFERENCE).name,
        "models": {
            "generate": "ensemble",
            "infer": "ensemble_infer" if part.decoupled else "ensemble",
            "stream": "tensorrt_llm_bls",
            "engine": "tensorrt_llm",
        },
        "decoupled": part.decoupled,
        **{name: build[name] for name in ("max_batch_size", "max_input_len", "max_seq_len")},
        "vocab_size": config["pretrained_config"]["vocab_size"],
        "end_id": texts["end_ids"][0] if texts["end_ids"] else None,
        **texts,
        "streams": stream_capacity.streams(part, build["max_batch_size"]),
        "tokenizer_dir": TOKENIZER_DIR,
        "parameters": [vars(one) for one in engine_parameters.resolve(config, part)],
        "tensorrt_llm": config["version"],
        "world_size": config["pretrained_config"].get("mapping", {}).get("world_size", 1),
    }


def _check_tokenizer(snapshot: Path) -> None:
    if not (snapshot / "tokenizer.json").is_file():
        raise UnsupportedError(
            f"{snapshot} has no tokenizer.json, the only tokenizer format that can be served.",
            hint="Create it: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)",
        )
