"""Whether a model's tokenizer files are whole, and what they say: judged from the files alone, before any weight.

A child process loads tokenizer.json with the library that serves it (builder.tokenizer.worker); the files around it are
read here. Imports neither tokenizers nor transformers.
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
# Two words that no template writes by itself; what follows the second is how an answer ends.
CONVERSATION = ({"role": "user", "content": "Xyzzyquestion?"}, {"role": "assistant", "content": "Xyzzyanswer."})


@dataclass(frozen=True)
class Tokenizer:
    """What a directory's tokenizer files say.

    `largest` is the largest token id, `largest_base` that of the vocabulary without added tokens, `used` the largest
    in a sample text and a conversation. `front` and `behind` are the ids that the post-processor adds to a text.
    `unknown` are named special tokens that tokenizer.json lacks, `moved` added tokens that get another id than it says.
    `end_of_turn` is the special token that the chat template writes after an answer, `end` the tokenizer's own end.
    `template_problem` says why the template can't be rendered, None if it can or there is none.
    """

    largest: int
    largest_base: int
    used: int
    beyond: tuple[tuple[int, str], ...]
    front: tuple[int, ...]
    behind: tuple[int, ...]
    end: tuple[int, str] | None
    end_of_turn: tuple[int, str] | None
    unknown: tuple[str, ...]
    moved: tuple[str, ...]
    template: ChatTemplate | None
    template_problem: TemplateProblem | None = None
    front_in_template: bool = False


def copy(source: Path, target: Path) -> None:
    """The tokenizer files of a model directory, so that transformers 4.57 and 5 read them; byte for byte otherwise."""
    for file in tokenizer_files(source):
        shutil.copyfile(file, target / file.name)
    config = json_object(source / CONFIG)
    readable = for_transformers_4(config)
    if readable != config:
        (target / CONFIG).write_text(json.dumps(readable, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def for_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in the words of transformers 4, which 5 reads too.

    5 saves classes that 4.57 does not have (TokenizersBackend is its PreTrainedTokenizerFast) and a list as
    `extra_special_tokens`, where 4.57 expects a mapping (SpecialTokensMixin).
    """
    readable = dict(config)
    if str(config.get("tokenizer_class", "")).endswith("Backend"):
        readable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        readable["additional_special_tokens"] = readable.pop("extra_special_tokens")
    return readable


def largest_token_id(directory: Path) -> int:
    """The largest id that the tokenizer of a model directory can make. Some models name added tokens that they have no
    embedding for (<image_soft_token> of Gemma 3's text-only sizes): `check` tells those from a foreign tokenizer."""
    return read(directory).largest


def check(directory: Path, config: Mapping[str, Any], where: str) -> Tokenizer:
    """IntegrityError, with the file's name, if the tokenizer can't be read or makes ids that the model has not."""
    found = read(directory, where)
    _ids(config.get("eos_token_id"), f"{where}/config.json")
    _ids(json_object(directory / GENERATION, where).get("eos_token_id"), f"{where}/{GENERATION}")
    size = vocab_size(config)
    if size is not None and max(found.largest_base, found.used) >= size:
        raise IntegrityError(
            f"The model and its tokenizer do not belong together: {where}/{TOKENIZER} makes ids beyond the vocabulary.",
            why=f"Its largest id is {max(found.largest_base, found.used)}, and config.json has a vocab_size of {size}.",
            hint="Fetch model and tokenizer from the same place; where tokens were added, resize the model's "
            "embeddings (model.resize_token_embeddings(len(tokenizer))) and save it again.",
        )
    return found


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """config.json's vocab_size, None where there is no such number."""
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def read(directory: Path, where: str = "") -> Tokenizer:
    """What the tokenizer files of a directory say. IntegrityError for one that is empty, broken or no tokenizer's.

    Files that did not change are not read twice.
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
    told, rendered = _ask(directory, job)
    if "error" in told:
        raise _unreadable(where, str(told["why"]))
    _check_described(told, named.values(), template, where)
    ids: dict[str, int | None] = told["ids"]
    eos = named.get("eos_token")
    end = ids.get(eos) if eos is not None else None
    used = [*told["sample"], *rendered.get("ids", ())]
    ends = rendered.get("ends") or [None]
    return Tokenizer(
        largest=told["largest"],
        largest_base=told["largest_base"],
        used=max(used),
        beyond=tuple((id, content) for id, content in told["beyond"]),
        front=tuple(told["front"]),
        behind=tuple(told["behind"]),
        end=(end, eos) if end is not None and eos is not None else None,
        end_of_turn=(ends[0][0], ends[0][1]) if ends[0] else None,
        unknown=tuple(f"{kind} {name!r}" for kind, name in sorted(named.items()) if ids[name] is None),
        moved=tuple(content for content, _ in told["moved"]),
        template=template,
        template_problem=TemplateProblem(rendered["error"], rendered["why"]) if "error" in rendered else None,
        front_in_template=bool(told["front"]) and rendered.get("ids", [])[: len(told["front"])] == told["front"],
    )


def _ask(directory: Path, job: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the child says of tokenizer and chat template; of the second nothing where there is none."""
    child = chat_template.start_worker(workers.TOKENIZER, str(directory.absolute()), stdin=subprocess.PIPE)
    try:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(job).encode())
            child.stdin.close()
        except BrokenPipeError:
            pass  # it ended: its answer says so
        child.stdin = None
        told = chat_template.read_response(child, wall=600)
        if "error" in told or "template" not in job:
            return told, {}
        return told, chat_template.read_response(child)
    finally:
        child.kill()
        child.communicate()


def _unreadable(where: str, why: str) -> IntegrityError:
    return IntegrityError(f"{where}/{TOKENIZER} is no tokenizer that can be loaded.", why=why, hint=SAVE_AGAIN)


def _check_described(
    told: Mapping[str, Any], named: Collection[str], template: ChatTemplate | None, where: str
) -> None:
    """IntegrityError for a tokenizer that loads and can't be meant. The library gives an added token the id after the
    vocabulary's last, whatever the file says; one that nobody uses is only worth a note."""
    if not told["sample"]:
        raise _unreadable(where, "It makes no token of a text.")
    moved = [
        (content, id) for content, id in told["moved"] if content in named or (template and content in template.text)
    ]
    if moved:
        listed = ", ".join(f"{content!r} as {id}" for content, id in moved[:4])
        raise _unreadable(where, f"Its added_tokens get other ids than the file says: {listed}.")


def _check_files(directory: Path, where: str) -> dict[str, str]:
    """The named special tokens (eos_token: its text). IntegrityError for a file that is not what its name says."""
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
    """IntegrityError unless added_tokens_decoder maps ids to tokens, and added_tokens.json tokens to ids."""
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
    """eos_token_id of a configuration as a list. IntegrityError for what is no id."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise IntegrityError(
            f"{file} has {quoted(value)} as eos_token_id.",
            why="It takes the id of a token, or a list of ids.",
            hint="Correct it by the file of the model that this one was made from.",
        )
    return ids


def _text(token: Any) -> str | None:
    """A special token's text, which the files hold alone or with its properties."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _wrong(where: str, name: str, why: str) -> IntegrityError:
    return IntegrityError(f"{where}/{name} is not what a tokenizer saves.", why=f"{why}.", hint=SAVE_AGAIN)


def notes(directory: Path, config: Mapping[str, Any], end_ids: Sequence[int]) -> list[tuple[str, str]]:
    """(rule, text): what a user should know of a model's tokenizer, which is served with these end ids."""
    found, size = read(directory), vocab_size(config)
    known = _end_notes(directory, config, found, list(end_ids))
    if found.template_problem and found.template is not None:
        known.append(
            ("chat template", f"The chat template ({found.template.file}) {found.template_problem}: clients that apply "
             "it will fail.")
        )  # fmt: skip
    if found.unknown:
        known.append(("special tokens", f"{TOKENIZER} does not have {', '.join(found.unknown)}."))
    beyond = [f"{content!r} ({id})" for id, content in found.beyond if size is not None and id >= size]
    if beyond:
        known.append(
            ("tokens without embedding", f"The model has no embedding for {', '.join(beyond[:4])}"
             f"{', ...' if len(beyond) > 4 else ''}: a prompt with one of them is rejected.")
        )  # fmt: skip
    if found.moved:
        known.append(
            ("special tokens", f"{', '.join(map(repr, found.moved[:4]))}{', ...' if len(found.moved) > 4 else ''} of "
             f"{TOKENIZER} get other ids than the file says; a text with one of them is misread.")
        )  # fmt: skip
    if found.behind:
        known.append(("special tokens", f"The tokenizer puts {list(found.behind)} behind every prompt."))
    return known


def _end_notes(
    directory: Path, config: Mapping[str, Any], found: Tokenizer, end_ids: list[int]
) -> list[tuple[str, str]]:
    """Where the files do not agree on what ends an answer: a model that says another end runs on past it."""
    size, where = vocab_size(config), str(directory)
    if not end_ids:
        return [("end ids", "No file of the model names an end id: every answer has max_tokens tokens. Set one with "
                 "--set 'repository.end_ids=[ID]'.")]  # fmt: skip
    said = {
        "the chat template": [found.end_of_turn] if found.end_of_turn else [],
        "tokenizer_config.json": [found.end] if found.end else [],
        "config.json": [(id, "") for id in _ids(config.get("eos_token_id"), where)],
        GENERATION: [(id, "") for id in _ids(json_object(directory / GENERATION, where).get("eos_token_id"), where)],
    }
    lacking = {source: [one for one in ends if one[0] not in end_ids] for source, ends in said.items()}
    known = []
    if any(lacking.values()):
        texts = [
            f"{source} ends with {', '.join(f'{id} {text}'.strip() for id, text in ends)}"
            for source, ends in lacking.items()
            if ends
        ]
        more = dict.fromkeys([id for ends in lacking.values() for id, _ in ends if size is None or 0 <= id < size])
        consequence = "a chat answer runs on past its turn" if lacking["the chat template"] else "it does not end there"
        known.append(
            ("end ids", f"Answers end at {end_ids}, but {'; '.join(texts)}: {consequence}. If that is wrong: "
             f"--set 'repository.end_ids={[*more, *end_ids]}'")
        )  # fmt: skip
    never = [id for id in end_ids if size is not None and not 0 <= id < size]
    if never:
        known.append(("end ids", f"The end ids {never} are outside of the vocabulary of {size}: they never come."))
    return known
