"""Engine -> Repository: renders the Triton models, parses each config.pbtxt back and refuses what would not serve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core import manifest as manifests
from builder.core import paths
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.store import MANIFEST, Artifact, Store, library_versions, read, sources_digest
from builder.core.untrusted_text import parse_json, read_regular
from builder.recipe import schema
from builder.recipe.target_facts import ENGINE, REFERENCE
from builder.tokenizer import files as tokenizer_files
from builder.triton import stream_capacity
from builder.trtllm import compatibility
from builder.trtllm.compatibility import LOGITS_TYPES

if TYPE_CHECKING:
    from builder.hub.snapshot import Snapshot
    from builder.trtllm.engine import Engine

TOKENIZER_DIR = "preprocessing/1/tokenizer"  # below the model repository
SAME_CODE = {"ensemble_infer": "tensorrt_llm_bls"}
MACROS = paths.data("triton_templates", "macros.j2")
LEFTOVERS = ("${", "{{", "}}", "{%", "==SUPPRESS==")
# Of the request's inputs, by the models that look after them themselves (the note in triton-tensors.json).
REQUIRED = ("text_input", "max_tokens")
# They take one prompt a request; the engine does the batching.
ONE_AT_A_TIME = ("tensorrt_llm_bls", "ensemble_infer")


@dataclass(frozen=True)
class Repository:
    """`models` is what Triton serves; `facts` is what a client has to know about it."""

    path: Path
    digest: str
    facts: Mapping[str, Any]

    @property
    def models(self) -> Path:
        return self.path / "models"


def render(engine: Engine, snapshot: Snapshot, part: schema.Repository, *, store: Store) -> Repository:
    """The model repository that serves this engine with this tokenizer."""
    templates, tensors = sources(engine.config["version"])
    ingredients = {
        "engine": engine.digest,
        "engine_path": str(engine.path.resolve()),
        "snapshot": snapshot.digest,
        "part": part.model_dump(mode="json"),
        "libraries": library_versions("jinja2"),
        "sources": sources_digest(
            "builder/triton/repository.py",
            "builder/triton/stream_capacity.py",
            "builder/trtllm/compatibility.py",
            "builder/model/files.py",
            "builder/tokenizer/files.py",
            templates,
            MACROS,
            tensors,
        ),
    }

    def make(directory: Path) -> Mapping[str, Any]:
        facts = write(directory / "models", engine.path.resolve(), snapshot.path, part)
        snapshot.source.check_unchanged()  # the tokenizer is copied from it
        return facts

    return _repository(store.stage("repository", ingredients, make))


def open_repository(path: Path) -> Repository:
    """A finished repository by its directory or a link to it. UsageError if it is none, IntegrityError if changed."""
    directory = Path(path).resolve()
    artifact = read(directory)
    if artifact is None and (directory / MANIFEST).is_file():
        compatibility.check(directory / "models")  # where an edit is at odds with the engine, that is what to say
        raise _changed(directory, "Make it again: the same `builder build`, with --from render")
    if artifact is None or artifact.stage != "repository":
        raise UsageError(f"{path} is no finished repository.", hint="Build one: builder build --model MODEL --gpu GPU")
    return _repository(artifact)


def check_served(repository: Repository) -> None:
    """IntegrityError if the engine or checkpoint that a repository serves is in a store, and was changed there."""
    for name, below, stage in (("engine", "", "engine"), ("checkpoint", "unified", "quantize")):
        served = Path(str(repository.facts.get(name, "")))
        directory = served.parent if below and served.name == below else served
        if name in repository.facts and (directory / MANIFEST).is_file() and read(directory) is None:
            compatibility.check(repository.models)
            raise _changed(directory, f"Make it again: the same `builder build`, with --from {stage}")


def _changed(directory: Path, hint: str) -> IntegrityError:
    try:
        wrong = list(manifests.file_problems(directory, manifests.load(directory), hashed_up_to=manifests.SMALL))
    except manifests.Damaged as error:
        wrong = [f"its {MANIFEST}: {error}"]
    return IntegrityError(
        f"{directory} is not what was made: files were changed, added or are missing.",
        why="\n".join(wrong[:10]),
        hint=hint,
    )


def find(root: Path, named: str | None = None) -> Path:
    """Which of root/models is meant where no path was given: the one that `named` says, else the only one there is."""
    there = sorted(path for path in (root / "models").glob("*") if not path.name.startswith("."))
    found = [path for path in there if named in (None, "", path.name)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name for path in there) or "nothing"
    hint = "Build one first: builder build --model MODEL --gpu GPU"
    if there:
        hint = f"Name one: MODEL_REPOSITORY={there[0].name}, or give its path"
    raise UsageError(
        f"{root / 'models'} has no repository {named!r}." if named else f"Which repository of {root / 'models'}?",
        why=f"There is {names}.",
        hint=hint,
    )


def write(models: Path, engine: Path, snapshot: Path, part: schema.Repository) -> dict[str, Any]:
    """Renders every model into `models`, checks the whole, and returns the facts. IntegrityError if it can't serve."""
    config = _json(engine / "config.json")
    ids = special_ids(snapshot, part.end_ids)
    values = _values(engine, config, ids, part)
    templates, _ = sources(config["version"])
    for source in sorted(path.parent for path in templates.glob("*/config.pbtxt.j2")):
        if source.name == "ensemble_infer" and not part.decoupled:
            continue
        model = models / source.name
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(rendered(source, values), encoding="utf-8")
        code = templates / SAME_CODE.get(source.name, source.name) / "1" / "model.py"
        if code.is_file():
            shutil.copyfile(code, model / "1" / "model.py")
    _copy_tokenizer(snapshot, models / TOKENIZER_DIR)
    check(models, max_batch_size=values["max_batch_size"], decoupled=part.decoupled)
    return _facts(engine, config, ids, part)


def special_ids(snapshot: Path, chosen: Sequence[int] | None = None) -> dict[str, Any]:
    """{"end_ids": [...], "pad_id": n} as the model's own files say: generation_config, config, tokenizer_config. End
    ids that a recipe chose go before theirs."""
    generation, config = _json(snapshot / "generation_config.json"), _json(snapshot / "config.json")
    text = config.get("text_config") or {}

    def find(kind: str) -> Any:
        for source in (generation, config, text):
            if source.get(f"{kind}_token_id") is not None:
                return source[f"{kind}_token_id"]
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _json(snapshot / name).get(f"{kind}_token")
            if token is not None:
                return _token_id(snapshot, token["content"] if isinstance(token, dict) else token)
        return None

    end, pad = list(chosen) if chosen else find("eos"), find("pad")
    end_ids = list(dict.fromkeys(end)) if isinstance(end, list) else [] if end is None else [end]
    if pad is None:
        pad = end_ids[0] if end_ids else 0
    return {"end_ids": end_ids, "pad_id": pad}


def _token_id(snapshot: Path, token: str) -> int | None:
    """The id of a token in tokenizer.json: an added one or, as Llama 2's </s> in some conversions, of the vocabulary
    alone, which a Unigram model lists in the order of its ids."""
    tokenizer = _json(snapshot / "tokenizer.json")
    added = {one["content"]: int(one["id"]) for one in tokenizer.get("added_tokens", [])}
    vocab = tokenizer.get("model", {}).get("vocab", {})
    ids = vocab if isinstance(vocab, dict) else {piece[0]: id for id, piece in enumerate(vocab)}
    return added.get(token, ids.get(token))


def check(models: Path, *, max_batch_size: int, decoupled: bool) -> None:
    """Parses every config.pbtxt as Triton does, and raises IntegrityError with all that Triton would not notice."""
    found = [
        f"{path.parent.name}: {problem}"
        for path in sorted(models.glob("*/config.pbtxt"))
        for problem in problems(path, max_batch_size=max_batch_size, decoupled=decoupled)
    ]
    if found:
        raise IntegrityError(
            "The rendered model repository would not serve.",
            why="\n".join(found),
            hint="This is a fault of the templates in triton_templates/, or of an edit to them.",
        )


def problems(path: Path, *, max_batch_size: int, decoupled: bool) -> list[str]:
    """What is wrong with one config.pbtxt."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = path.read_text(encoding="utf-8")
    found = [f"{leftover} was left in it" for leftover in LEFTOVERS if leftover in text]
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        return [*found, f"it does not parse: {error}"]
    name = path.parent.name
    if config.name != name:
        found.append(f"its name is {config.name!r}")
    for kind, entries in (("input", config.input), ("output", config.output)):
        found += [f"{kind} {twice} is declared twice" for twice in _twice(entry.name for entry in entries)]
    if any(group.count < 1 for group in config.instance_group):
        found.append("it has no instance")
    if config.max_batch_size != (wanted := 1 if name in ONE_AT_A_TIME else max_batch_size):
        found.append(f"max_batch_size is {config.max_batch_size} instead of {wanted}")
    streams = decoupled and name in ("tensorrt_llm", "tensorrt_llm_bls")
    if config.model_transaction_policy.decoupled != streams:
        found.append(f"decoupled is {config.model_transaction_policy.decoupled} instead of {streams}")
    return found


def repository_key(repository: Repository) -> str:
    """What tests and measurements of a served repository depend on beside its digest: the engine's content too."""
    return repository.path.name


def _repository(artifact: Artifact) -> Repository:
    return Repository(artifact.path, artifact.digest, artifact.facts)


def sources(version: str) -> tuple[Path, Path]:
    """The templates for this TensorRT-LLM's minor version, and the tensors that its models exchange."""
    templates = paths.data("triton_templates", ".".join(version.split(".")[:2]))
    tensors = paths.data("configs", "trtllm", version, "triton-tensors.json")
    if not (templates.is_dir() and tensors.is_file()):
        known = sorted(path.parent.name for path in paths.data("configs", "trtllm").glob("*/triton-tensors.json"))
        raise UnsupportedError(
            f"There are no Triton templates for TensorRT-LLM {version}.", hint=f"Known: {', '.join(known)}."
        )
    return templates, tensors


def rendered(source: Path, values: Mapping[str, Any]) -> str:
    """The config.pbtxt of a template's directory. Every name in it must have a value."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([source.parent, MACROS.parent]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = quote
    return environment.get_template(f"{source.name}/config.pbtxt.j2").render(values)


def quote(value: object) -> str:
    """A string literal of protobuf's text format: JSON's escapes are among those that it knows."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\177")


def _values(engine: Path, config: Mapping[str, Any], ids: Mapping[str, Any], part: schema.Repository) -> dict[str, Any]:
    """Everything that the templates name."""
    pretrained, build = config["pretrained_config"], config["build_config"]
    tensors = _tensors(config["version"], pretrained["logits_dtype"])
    return {
        "max_batch_size": build["max_batch_size"],
        "decoupled": part.decoupled,
        "queue": {"delay_microseconds": part.max_queue_delay_microseconds, "size": part.max_queue_size},
        "instances": {
            "preprocessing": part.preprocessing_instances,
            "postprocessing": part.postprocessing_instances,
            "bls": stream_capacity.at_once(part, build["max_batch_size"]),
        },
        "tensors": tensors,
        "required_inputs": [
            {key: value for key, value in entry.items() if key != "optional" or entry["name"] not in REQUIRED}
            for entry in tensors["request"]["input"]
        ],
        "steps": _steps(tensors),
        "tokenizer": {"tokenizer_dir": TOKENIZER_DIR, "skip_special_tokens": "true"},
        "answers": {"exclude_input_in_output": _lower(part.exclude_input_in_output)},
        "limits": {
            "add_special_tokens": "true",
            "end_ids": json.dumps(ids["end_ids"]),
            "pad_id": ids["pad_id"],
            "vocab_size": pretrained["vocab_size"],
            "max_input_len": build["max_input_len"],
            "max_seq_len": build["max_seq_len"],
            "max_beam_width": build.get("max_beam_width", 1),
            "context_logits": _lower(bool(build.get("gather_context_logits"))),
        },
        "engine": _engine_parameters(engine, build, part),
        "bls": {
            "engine_decoupled": _lower(part.decoupled),
            "exclude_input_in_output": _lower(part.exclude_input_in_output),
            **{name: json.dumps(entries) for name, entries in tensors["maps"].items()},
        },
    }


def _tensors(version: str, logits_dtype: str) -> dict[str, Any]:
    if logits_dtype not in LOGITS_TYPES:
        raise UnsupportedError(
            f"The engine's logits are {logits_dtype}, which Triton has no type for.",
            hint=f"Build it with one of {', '.join(LOGITS_TYPES)}.",
        )
    _, file = sources(version)
    text = file.read_text(encoding="utf-8").replace("$logits_datatype", LOGITS_TYPES[logits_dtype])
    tensors: dict[str, Any] = json.loads(text)
    return tensors


def _steps(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The ensemble's wiring. A tensor between steps has the name of the output that makes it, with a step's prefix."""
    maps = tensors["maps"]
    preprocessed = {entry["name"]: f"_{entry['name']}" for entry in tensors["preprocessing"]["output"]}
    answered = {entry["name"] for entry in tensors["request"]["output"]} - {"text_output"}
    from_request = {k: v for k, v in maps["tensorrt_llm_from_request"].items() if k != "streaming"}
    between = maps["postprocessing_from_tensorrt_llm"]
    return {
        "preprocessing": {
            "input": {**maps["preprocessing_from_request"], "STREAM": "stream"},
            "output": preprocessed,
        },
        "tensorrt_llm": {
            "input": {
                **{k: preprocessed[v] for k, v in maps["tensorrt_llm_from_preprocessing"].items()},
                **from_request,
            },
            "output": {**{name: f"_{name.upper()}" for name in between.values()}, **{n: n for n in sorted(answered)}},
        },
        "postprocessing": {
            "input": {k: f"_{v.upper()}" for k, v in between.items()},
            "output": {"OUTPUT": "text_output"},
        },
    }


def _engine_parameters(engine: Path, build: Mapping[str, Any], part: schema.Repository) -> dict[str, Any]:
    """Parameters of the C++ backend. One that is absent has its default there (model_instance_state.cc@c8c6df08).

    An engine of several ranks needs none more: in leader mode each rank is a server of its own, started by mpirun
    (serve.launch_command), and without `gpu_device_ids` all visible GPUs are used (docs/model_config.md).
    """
    paged = compatibility.has_paged_fmha(build)
    asked = {name: getattr(part, name) for name in compatibility.NEED_PAGED_FMHA}
    for name in compatibility.lacking_paged_fmha(build, [name for name, value in asked.items() if value]):
        raise UsageError(
            f"repository.{name} needs an engine with paged context FMHA, and this one has none.",
            hint=f"Leave {name} out, or build with --set engine.flags.use_paged_context_fmha=enable "
            "on a profile with context FMHA.",
        )
    return {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": engine,
        "max_beam_width": build.get("max_beam_width", 1),
        "batch_scheduler_policy": part.batch_scheduler_policy,
        "kv_cache_free_gpu_mem_fraction": part.kv_cache_free_gpu_mem_fraction,
        "exclude_input_in_output": _lower(part.exclude_input_in_output),
        **{name: _lower(paged if value is None else value) for name, value in asked.items()},
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    }


def _facts(engine: Path, config: Mapping[str, Any], ids: Mapping[str, Any], part: schema.Repository) -> dict[str, Any]:
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
        "end_id": ids["end_ids"][0] if ids["end_ids"] else None,
        **ids,
        "bls_instances": stream_capacity.at_once(part, build["max_batch_size"]),
        "tokenizer_dir": TOKENIZER_DIR,
        "engine": str(engine),
        "tensorrt_llm": config["version"],
        "world_size": config["pretrained_config"].get("mapping", {}).get("world_size", 1),
    }


def _copy_tokenizer(snapshot: Path, target: Path) -> None:
    if not (snapshot / "tokenizer.json").is_file():
        raise UnsupportedError(
            f"{snapshot} has no tokenizer.json, the one tokenizer format that is served.",
            hint="Write it with: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)",
        )
    target.mkdir(parents=True)
    tokenizer_files.copy(snapshot, target)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is absent."""
    if not path.is_file():
        return {}
    try:
        loaded = parse_json(read_regular(path))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} can't be read as JSON.", why=str(error), hint="Fetch the model again.") from None
    if not isinstance(loaded, dict):
        raise IntegrityError(f"{path} is a JSON {type(loaded).__name__}, no object.", hint="Fetch the model again.")
    return loaded


def _lower(value: bool) -> str:
    return str(value).lower()


def _twice(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
