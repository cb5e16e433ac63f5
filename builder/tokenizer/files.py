"""Checks a model's tokenizer files and describes them, before any weight is downloaded.

A worker process loads tokenizer.json with the library that the served model uses (builder.tokenizer.worker); the other
files are read here. Imports neither tokenizers nor transformers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from builder.core import workers
from builder.core.errors import IntegrityError
from builder.core.safe_text import quoted
from builder.model.files import GENERATION, SAVE_AGAIN, json_object, tokenizer_files
from builder.tokenizer import chat_template
from builder.tokenizer.chat_template import ChatTemplate, TemplateProblem

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
LARGEST = 1 << 29  # bytes; Gemma's, one of the largest, has 33 MB
NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Two words that no template writes by itself. The text after the second one is how an answer ends.
CONVERSATION = ({"role": "user", "content": "Xyzzyquestion?"}, {"role": "assistant", "content": "Xyzzyanswer."})


@dataclass(frozen=True)
class Tokenizer:
    """What a directory's tokenizer files contain. Tokens are (id, text).

    `max_id`: the largest token id; `max_base_id`: the largest without added tokens; `max_sample_id`: the largest in a
    sample text and a conversation. `highest_added`: the added tokens with the highest ids.
    `prefix_ids`, `suffix_ids`: ids that the post-processor adds before and after a text, such as BOS.
    `eos`: the tokenizer's own end token; `end_of_turn`: the special token that the chat template writes after answers.
    `missing_special`: named special tokens that tokenizer.json lacks; `reassigned`: added tokens whose id is not the
    one in tokenizer.json.
    `template_problem`: why the chat template can't be rendered; None if it can, or there is none.
    `prefix_in_template`: the chat template writes `prefix_ids` itself.
    """

    max_id: int
    max_base_id: int
    max_sample_id: int
    highest_added: tuple[tuple[int, str], ...]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    eos: tuple[int, str] | None
    end_of_turn: tuple[int, str] | None
    missing_special: tuple[str, ...]
    reassigned: tuple[str, ...]
    template: ChatTemplate | None
    template_problem: TemplateProblem | None = None
    prefix_in_template: bool = False


def copy(source: Path, target: Path) -> None:
    """Copies the tokenizer files of a model directory.

    tokenizer_config.json is changed if transformers 4.57 could not read it; all other files are copied as they are.
    """
    for file in tokenizer_files(source):
        shutil.copyfile(file, target / file.name)
    config = json_object(source / CONFIG)
    readable = for_transformers_4(config)
    if readable != config:
        (target / CONFIG).write_text(json.dumps(readable, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in the format of transformers 4, which version 5 reads, too.

    Version 5 saves classes that 4.57 lacks (TokenizersBackend is PreTrainedTokenizerFast there), and a list as
    `extra_special_tokens`, where 4.57 expects a mapping (SpecialTokensMixin).
    """
    readable = dict(config)
    if str(config.get("tokenizer_class", "")).endswith("Backend"):
        readable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        readable["additional_special_tokens"] = readable.pop("extra_special_tokens")
    return readable


def largest_token_id(directory: Path) -> int:
    """The largest id that the tokenizer of a model directory can produce.

    It may exceed the vocabulary: some models list added tokens that have no embedding (<image_soft_token> of Gemma 3's
    text-only sizes). `check` tells those from a tokenizer of another model.
    """
    return read(directory).max_id


def check(directory: Path, config: Mapping[str, Any], where: str) -> Tokenizer:
    """Reads the tokenizer and checks that it fits the model. `where` names the model in messages.

    IntegrityError, naming the file, if it can't be read or produces ids beyond the model's vocabulary.
    """
    found = read(directory, where)
    _ids(config.get("eos_token_id"), f"{where}/config.json")
    _ids(json_object(directory / GENERATION, where).get("eos_token_id"), f"{where}/{GENERATION}")
    size = vocab_size(config)
    largest = max(found.max_base_id, found.max_sample_id)
    if size is not None and largest >= size:
        raise IntegrityError(
            f"The tokenizer does not match the model: {where}/{TOKENIZER} produces ids beyond the vocabulary.",
            why=f"Its largest id is {largest}, and config.json has a vocab_size of {size}.",
            hint="Download model and tokenizer from the same place. If tokens were added, resize the model's "
            "embeddings (model.resize_token_embeddings(len(tokenizer))) and save it again.",
        )
    return found


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """The vocab_size of a parsed config.json (of its text_config for multimodal models); None if it has none."""
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def read(directory: Path, where: str = "") -> Tokenizer:
    """Describes the tokenizer of a directory. IntegrityError if a file is empty, broken or not a tokenizer's.

    The result is cached until a file changes. `where` names the model in messages (default: the directory).
    """
    files = [*tokenizer_files(directory), directory / GENERATION]
    stats = [(path.name, path.stat()) for path in files if path.is_file()]
    seen = tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)
    return _read(directory, where or str(directory), seen)


@lru_cache(maxsize=16)
def _read(directory: Path, where: str, seen: tuple[object, ...]) -> Tokenizer:
    named = _check_files(directory, where)
    template = chat_template.find(directory)
    job: dict[str, Any] = {"tokens": sorted(set(named.values())), "messages": CONVERSATION}
    if template is not None:
        job |= {"template": template.text, "variables": dict(template.variables)}
    described, rendered = _run_worker(directory, job)
    if "error" in described:
        raise _unreadable(where, str(described["why"]))
    _check_described(described, named.values(), template, where)
    ids: dict[str, int | None] = described["ids"]
    eos = named.get("eos_token")
    eos_id = ids.get(eos) if eos is not None else None
    prefix, rendered_ids = described["prefix_ids"], rendered.get("ids", [])
    ends = rendered.get("ends") or [None]
    return Tokenizer(
        max_id=described["max_id"],
        max_base_id=described["max_base_id"],
        max_sample_id=max([*described["sample"], *rendered_ids]),
        highest_added=tuple((id, content) for id, content in described["highest_added"]),
        prefix_ids=tuple(prefix),
        suffix_ids=tuple(described["suffix_ids"]),
        eos=(eos_id, eos) if eos_id is not None and eos is not None else None,
        end_of_turn=(ends[0][0], ends[0][1]) if ends[0] else None,
        missing_special=tuple(f"{kind} {name!r}" for kind, name in sorted(named.items()) if ids[name] is None),
        reassigned=tuple(content for content, _ in described["reassigned"]),
        template=template,
        template_problem=TemplateProblem(rendered["error"], rendered["why"]) if "error" in rendered else None,
        prefix_in_template=bool(prefix) and rendered_ids[: len(prefix)] == prefix,
    )


def _run_worker(directory: Path, job: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The worker's two responses: on the tokenizer, and on the chat template ({} if there is none)."""
    child = chat_template.start_worker(workers.TOKENIZER, str(directory.absolute()), stdin=subprocess.PIPE)
    try:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(job).encode())
            child.stdin.close()
        except BrokenPipeError:
            pass  # it has exited; read_response returns why
        child.stdin = None
        described = chat_template.read_response(child, wall=600)
        if "error" in described or "template" not in job:
            return described, {}
        return described, chat_template.read_response(child)
    finally:
        child.kill()
        child.communicate()


def _unreadable(where: str, why: str) -> IntegrityError:
    return IntegrityError(f"{where}/{TOKENIZER} can't be loaded as a tokenizer.", why=why, hint=SAVE_AGAIN)


def _check_described(
    described: Mapping[str, Any], named: Collection[str], template: ChatTemplate | None, where: str
) -> None:
    """IntegrityError for a tokenizer that loads but can't be right.

    The library numbers added tokens after the vocabulary's last id, whatever the file says. That is an error for named
    special tokens and those in the chat template; for others it is only worth a note (see `notes`).
    """
    if not described["sample"]:
        raise _unreadable(where, "It produces no tokens.")
    reassigned = [
        (content, id)
        for content, id in described["reassigned"]
        if content in named or (template and content in template.text)
    ]
    if reassigned:
        listed = ", ".join(f"{content!r} is listed as {id}" for content, id in reassigned[:4])
        raise _unreadable(where, f"Its added_tokens do not get the ids that the file lists: {listed}.")


def _check_files(directory: Path, where: str) -> dict[str, str]:
    """{"eos_token": text, ...} of the named special tokens. IntegrityError for a file with invalid content."""
    if (directory / TOKENIZER).stat().st_size > LARGEST:
        raise _unreadable(where, f"It has {(directory / TOKENIZER).stat().st_size} bytes.")
    json_object(directory / TOKENIZER, where)
    config, special = json_object(directory / CONFIG, where), json_object(directory / "special_tokens_map.json", where)
    for name, content in ((CONFIG, config), ("special_tokens_map.json", special)):
        for key in NAMED:
            if content.get(key) is not None and _text(content[key]) is None:
                raise _wrong(where, name, f"{key} is {quoted(content[key])}, not a text")
    if not isinstance(config.get("tokenizer_class"), str | None):
        raise _wrong(where, CONFIG, f"tokenizer_class is {quoted(config['tokenizer_class'])}, not a name")
    _check_added(config, directory, where)
    tokens = {key: _text(config.get(key)) or _text(special.get(key)) for key in NAMED}
    return {key: text for key, text in tokens.items() if text}


def _check_added(config: Mapping[str, Any], directory: Path, where: str) -> None:
    """IntegrityError unless added_tokens_decoder maps ids to tokens, and added_tokens.json maps tokens to ids."""
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise _wrong(where, CONFIG, f"added_tokens_decoder is {quoted(decoder)}, not an object")
    for id, token in decoder.items():
        if not (id.isascii() and id.isdigit()) or not isinstance(token, Mapping) or _text(token) is None:
            raise _wrong(
                where, CONFIG, f"added_tokens_decoder has {quoted(id)}: {quoted(token)}, not an id and a token"
            )
    for token, id in json_object(directory / "added_tokens.json", where).items():
        if not isinstance(id, int) or isinstance(id, bool) or id < 0:
            raise _wrong(where, "added_tokens.json", f"{quoted(token)} has the id {quoted(id)}")


def _ids(value: Any, file: str) -> list[int]:
    """An eos_token_id as a list of ids. IntegrityError, naming the file, for any other type."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise IntegrityError(
            f"{file} has {quoted(value)} as eos_token_id.",
            why="It must be a token id or a list of ids.",
            hint="Copy the value from the base model.",
        )
    return ids


def _text(token: Any) -> str | None:
    """The text of a special token, which is a string or an object with `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _wrong(where: str, name: str, why: str) -> IntegrityError:
    return IntegrityError(f"{where}/{name} is not a valid tokenizer file.", why=f"{why}.", hint=SAVE_AGAIN)


def notes(directory: Path, config: Mapping[str, Any], end_ids: Sequence[int]) -> list[tuple[str, str]]:
    """Warnings about a model's tokenizer as (rule, text). `end_ids`: the ids at which the served model stops."""
    found, size = read(directory), vocab_size(config)
    warnings = _end_notes(directory, config, found, list(end_ids))
    if found.template_problem and found.template is not None:
        warnings.append(
            ("chat template", f"The chat template ({found.template.file}) {found.template_problem}: clients that apply "
             "it will fail.")
        )  # fmt: skip
    if found.missing_special:
        warnings.append(("special tokens", f"{TOKENIZER} lacks {', '.join(found.missing_special)}."))
    beyond = [f"{content!r} ({id})" for id, content in found.highest_added if size is not None and id >= size]
    if beyond:
        warnings.append(
            ("tokens without embedding", f"The model has no embedding for {', '.join(beyond[:4])}"
             f"{', ...' if len(beyond) > 4 else ''}: prompts that contain one are rejected.")
        )  # fmt: skip
    if found.reassigned:
        names = f"{', '.join(map(repr, found.reassigned[:4]))}{', ...' if len(found.reassigned) > 4 else ''}"
        warnings.append(
            ("special tokens", f"{names} of {TOKENIZER} do not get the ids that the file lists: the model misreads "
             "texts that contain one.")
        )  # fmt: skip
    if found.suffix_ids:
        warnings.append(("special tokens", f"The tokenizer appends {list(found.suffix_ids)} to every prompt."))
    return warnings


def _end_notes(
    directory: Path, config: Mapping[str, Any], found: Tokenizer, end_ids: list[int]
) -> list[tuple[str, str]]:
    """Warnings where the files disagree on the end ids: a model that ends with another id does not stop there."""
    size, where = vocab_size(config), str(directory)
    if not end_ids:
        return [("end ids", "No file of the model names an end id: every answer has max_tokens tokens. Set one with "
                 "--set 'repository.end_ids=[ID]'.")]  # fmt: skip
    sources = {
        "the chat template": [found.end_of_turn] if found.end_of_turn else [],
        "tokenizer_config.json": [found.eos] if found.eos else [],
        "config.json": [(id, "") for id in _ids(config.get("eos_token_id"), where)],
        GENERATION: [(id, "") for id in _ids(json_object(directory / GENERATION, where).get("eos_token_id"), where)],
    }
    ignored = {source: [token for token in ends if token[0] not in end_ids] for source, ends in sources.items()}
    warnings = []
    if any(ignored.values()):
        texts = [
            f"{source} ends with {', '.join(f'{id} {text}'.strip() for id, text in ends)}"
            for source, ends in ignored.items()
            if ends
        ]
        missing = dict.fromkeys([id for ends in ignored.values() for id, _ in ends if size is None or 0 <= id < size])
        consequence = (
            "chat answers continue past the end of the turn"
            if ignored["the chat template"]
            else "answers do not stop there"
        )
        warnings.append(
            ("end ids", f"Answers stop at {end_ids}, but {'; '.join(texts)}: {consequence}. If that is wrong: "
             f"--set 'repository.end_ids={[*missing, *end_ids]}'")
        )  # fmt: skip
    unreachable = [id for id in end_ids if size is not None and not 0 <= id < size]
    if unreachable:
        warnings.append(
            ("end ids", f"The end ids {unreachable} are outside of the vocabulary of {size}: they never occur.")
        )  # fmt: skip
    return warnings
