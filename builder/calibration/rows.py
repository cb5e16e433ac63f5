"""Text -> Calibration: a JSONL file, a bundled set or a Hub dataset becomes rows.jsonl, the first usable rows in order.

A row is {"text": ...} or {"messages": [{"role", "content"}, ...]}. Tokenizing (`token_batches`) happens in the worker
that quantizes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from builder.core import paths, workers
from builder.core.errors import UsageError
from builder.core.safe_text import printable_line, quoted
from builder.core.store import Store, library_versions, sha256, sources_digest
from builder.core.untrusted_text import parse_json
from builder.hub import client
from builder.recipe import schema
from builder.tokenizer import chat_template
from builder.tokenizer import files as tokenizer_files
from builder.tokenizer.special_tokens import encoder

if TYPE_CHECKING:
    import torch

ROWS = "rows.jsonl"
# Measured on the bundled model's 42 linear layers: the range of inputs over the first N tokens of
# builtin:python-docs-text, compared with all 13,137. With 48 tokens, 37 layers miss more than a tenth of their range
# (60 % at worst); with 2,048, 8 layers (37 %). Inputs outside the range are clipped when served.
MIN_TOKENS = 2048
FEW_ROWS = 32  # below this, a recipe deliberately calibrates on little text
SOURCES = ("builder/calibration/rows.py", "builder/core/untrusted_text.py", "builder/calibration/hub_dataset.py")
LONGEST_ROW = 64_000_000  # bytes
BUILTIN = "builtin:"
# The columns that are searched for text if none is named, most specific first.
COLUMNS = ("messages", "conversations", "text", "article", "content", "document", "prompt", "question", "instruction")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Use:
    """What the rows are used for: the stage that stores them, and the flags to suggest in error messages.

    flag: names the data. hint: sets a key, with the placeholders {key} and {value}.
    """

    stage: str
    flag: str
    hint: str


# Half of builtin:python-docs is messages: this is its other half.
TEXT_INSTEAD = 'Choose rows with "text": --calib-data builtin:python-docs-text, or a file or dataset of plain text.'
CALIBRATION = Use("calibration", "--calib-data", "--set calibration.{key}={value}")


@dataclass(frozen=True)
class Calibration:
    """The rows that the activation ranges are read from: `path` is rows.jsonl, `text_sha256` the hash of its bytes."""

    path: Path
    rows: int
    text_sha256: str
    digest: str


@dataclass
class Rows:
    """Usable rows, and the reasons for rejecting the others: {line or row number: reason}."""

    usable: list[dict[str, Any]]
    unusable: dict[int, str]


def calibrate(calibration: schema.Calibration, *, store: Store, use: Use = CALIBRATION) -> Calibration:
    """The calibration rows of a recipe, as a stage of the store. UsageError if no row is usable."""
    part = calibration
    file = local_file(part.data, use)
    ingredients: dict[str, Any] = {"samples": part.samples, "column": part.column, "code": sources_digest(*SOURCES)}
    if file is not None:
        ingredients |= {"file": sha256(file)}
    else:
        ingredients |= {"dataset": part.data, "endpoint": client.endpoint(), "config": part.config}
        ingredients |= {"split": part.split, "versions": library_versions("datasets", "pyarrow")}
        planned = use.stage, dict(ingredients)
        commit = client.resolve(part.data, part.revision, store=store, kind="dataset", planned=planned)
        ingredients["commit"] = commit

    def make(tmp: Path) -> dict[str, Any]:
        rows = read_jsonl(file, part.samples, part.column) if file else _rows_of_hub(part, commit, tmp, store, use)
        return {"data": part.data, "commit": None if file else commit, **_write(rows, tmp / ROWS, part, store, use)}

    artifact = store.stage(use.stage, ingredients, make)
    facts = artifact.facts
    return Calibration(artifact.path / ROWS, facts["rows"], facts["text_sha256"], artifact.digest)


def local_file(data: str, use: Use) -> Path | None:
    """The local file that `data` names, or None for a Hub dataset. UsageError for a file that is not JSONL."""
    if data.startswith(BUILTIN):
        known = {path.stem: path for path in paths.data("configs", "calibration").glob("*.jsonl")}
        name = data.removeprefix(BUILTIN)
        if name not in known:
            bundled = ", ".join(f"{BUILTIN}{stem}" for stem in sorted(known))
            raise UsageError(f"There is no bundled calibration set {quoted(name)}.", hint=f"Bundled: {bundled}.")
        return known[name]
    try:
        path = Path(data).expanduser()
        exists, is_file = path.exists(), path.is_file()
    except (OSError, RuntimeError, ValueError):
        exists, is_file, path = False, False, Path(".")
    if is_file and path.suffix in (".jsonl", ".ndjson", ".json"):
        return path.resolve()
    looks_local = exists or data.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".ndjson", ".json", ".txt")
    if looks_local or not client.HUB_ID.fullmatch(data):
        raise UsageError(
            f"{quoted(data)} is no JSONL file{'' if exists else ' (nothing is there)'}.",
            why='One JSON object per line is read, with "text" or "messages".',
            hint=f"{use.flag} FILE.jsonl, a dataset of the Hub, or {use.flag} builtin:python-docs",
        )
    return None


def read_jsonl(file: Path, samples: int, column: str | None) -> Rows:
    """The first `samples` usable rows of a JSONL file; blank lines are ignored."""

    def parsed() -> Iterator[tuple[int, Any]]:
        with open(file, "rb") as lines:
            for number, line in enumerate(_bounded(lines), 1):
                if line.strip():
                    yield number, _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)

    try:
        return collect(parsed(), samples, column)
    except OSError as error:
        raise UsageError(f"Can't read {file}.", why=str(error)) from None


def _bounded(lines: IO[bytes]) -> Iterator[bytes]:
    """Lines, cut after LONGEST_ROW + 1 bytes; the rest of a longer line is skipped without holding it in memory."""
    while line := lines.readline(LONGEST_ROW + 1):
        rest = line
        while len(rest) > LONGEST_ROW and not rest.endswith(b"\n"):
            rest = lines.readline(LONGEST_ROW + 1)
        yield line


def _parse(line: bytes) -> Any:
    """A JSON value, or a ValueError with the reason why the line is not one."""
    if len(line.rstrip(b"\r\n")) > LONGEST_ROW:
        return ValueError(f"is longer than {LONGEST_ROW} bytes")
    try:
        return parse_json(line)
    except UnicodeDecodeError as error:
        return ValueError(f"is not UTF-8 ({error.reason})")
    except ValueError as error:
        return ValueError(f"is no JSON ({error})")


def collect(rows: Iterable[tuple[int, Any]], samples: int, column: str | None) -> Rows:
    """The first `samples` usable rows of numbered ones, in canonical form, and why others were rejected.

    column: where the text is; None searches COLUMNS.
    """
    found = Rows([], {})
    for number, row in rows:
        try:
            found.usable.append(canonical(row, column))
        except ValueError as error:
            found.unusable[number] = str(error)
        if len(found.usable) == samples:
            break
    return found


def canonical(row: Any, column: str | None) -> dict[str, Any]:
    """A row as {"text"} or {"messages"}. ValueError with the reason if it has neither."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"is a JSON {type(row).__name__}, not an object")
    present = [name for name in ([column] if column else COLUMNS) if name in row]
    names = [name for name in present if row[name]] or present
    if not names:
        looked_for = repr(column) if column else '"text" or "messages"'
        others = ", ".join(printable_line(str(key)[:80]) for key in list(row)[:8])
        raise ValueError(f"has no {looked_for}, only {others or 'nothing'}")
    value = row[names[0]]
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"has an empty {names[0]!r}")
        return {"text": _encodable(value)}
    if not isinstance(value, Sequence) or not value or isinstance(value, bytes):
        raise ValueError(f"has a {type(value).__name__} as {names[0]!r}, neither text nor messages")
    return {"messages": [_message(message) for message in value]}


def _message(message: Any) -> dict[str, str]:
    if isinstance(message, Mapping):
        role = message.get("role") or SHAREGPT_ROLES.get(str(message.get("from")))
        content = message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _encodable(role), "content": _encodable(content)}
    raise ValueError('has a message without "role" and "content" as text')


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not text") from None
    return text


def _rows_of_hub(part: schema.Calibration, commit: str, tmp: Path, store: Store, use: Use) -> Rows:
    job: dict[str, Any] = {"job": "rows", "repo": part.data, "revision": part.revision, "commit": commit}
    job |= {"config": part.config, "split": part.split, "samples": part.samples, "column": part.column}
    job |= {"file": str(tmp / ROWS), "hint": use.hint}
    answer = client.run_hub_job(store, module=workers.HUB_DATASET, unit="rows", **job)
    lines = (tmp / ROWS).read_bytes().splitlines()  # of bytes: text would also be split at U+2028 and U+0085
    return Rows([json.loads(line) for line in lines], {int(k): v for k, v in answer["unusable"].items()})


def _write(rows: Rows, file: Path, part: schema.Calibration, store: Store, use: Use) -> dict[str, Any]:
    """Writes rows.jsonl and reports rejected rows. UsageError if no row is left."""
    reasons = [f"row {number} {reason}" for number, reason in list(rows.unusable.items())[:5]]
    if not rows.usable:
        raise UsageError(
            f"{part.data} has no usable row.",
            why="; ".join(reasons) or "It is empty.",
            hint='Rows need "text" or "messages"; or name the column: ' + use.hint.format(key="column", value="NAME"),
        )
    if rows.unusable:
        more = ", ..." if len(rows.unusable) > 5 else ""
        store.out.warn(f"{len(rows.unusable)} rows of {part.data} were skipped: {'; '.join(reasons)}{more}")
    if len(rows.usable) < part.samples:
        store.out.info(f"{part.data} has only {len(rows.usable)} of the {part.samples} requested rows; all are used")
    content = dump(rows.usable)
    file.write_bytes(content)
    return {
        "rows": len(rows.usable),
        "asked": part.samples,
        "passed_over": len(rows.unusable),
        "text_sha256": hashlib.sha256(content).hexdigest(),
    }


def dump(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as JSONL, deterministic: equal rows give equal bytes."""
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows).encode()


def token_batches(rows_path: Path, tokenizer: Any, *, seq_len: int, batch_size: int) -> list[torch.Tensor]:
    """Token ids of the rows, int64 [rows <= batch_size, tokens <= seq_len], in the order of the rows.

    Only rows of equal length share a batch, because ModelOpt would calibrate on padding as on text.
    """
    import torch

    waiting: dict[int, list[list[int]]] = defaultdict(list)
    batches: list[tuple[int, list[list[int]]]] = []
    with open(rows_path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for number, found in enumerate(_token_ids(rows, tokenizer)):
        ids = found[:seq_len]
        if not ids:
            continue
        alike = waiting[len(ids)]
        if not alike:
            batches.append((number, alike))
        alike.append(ids)
        if len(alike) == batch_size:
            waiting[len(ids)] = []
    if not batches:
        why = "The tokenizer produces no tokens from the calibration text."
        raise UsageError(why, hint="Choose another --calib-data.")
    return [torch.tensor(rows, dtype=torch.int64) for _, rows in batches]


def required_tokens(part: schema.Calibration) -> int:
    """How many tokens the rows must have in all; 0 if the recipe deliberately asks for less text."""
    few = part.samples < FEW_ROWS or part.samples * part.seq_len < MIN_TOKENS
    return 0 if few else MIN_TOKENS


def check_tokens(tokens: int, rows: int, least: int) -> None:
    """UsageError for calibration rows with too few tokens."""
    if tokens < least:
        raise UsageError(
            f"The calibration rows ({rows}) have {tokens} tokens, too few: at least {least:,} are needed.",
            why="Calibration reads the ranges of the activations from them; values outside are clipped when served.",
            hint="Use more text, or the bundled set: --calib-data builtin:python-docs. To calibrate on these rows "
            f"anyway: --calib-samples {min(rows, FEW_ROWS - 1)}",
        )


def _token_ids(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Iterator[list[int]]:
    """The token ids of each row. A chat template writes special tokens itself, so none are added to its text."""
    encode = encoder(tokenizer)
    with ExitStack() as stack:
        render: Callable[[int, Any], str] | None = None
        for number, row in enumerate(rows, 1):
            if "text" in row:
                yield encode(row["text"])
                continue
            render = render or stack.enter_context(_conversations(tokenizer))
            text = render(number, row["messages"])
            yield list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@contextmanager
def _conversations(tokenizer: Any) -> Iterator[Callable[[int, Any], str]]:
    """A function that renders a conversation with the tokenizer's chat template, in a process with limits; with the
    model's own code if the user trusts it. UsageError with the row's number if one can't be rendered."""
    if type(tokenizer).__module__.startswith("transformers_modules"):
        yield lambda number, messages: str(tokenizer.apply_chat_template(messages, tokenize=False))
        return
    if not tokenizer.chat_template:
        raise no_chat_template()
    try:
        text = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none of them is called default
        raise no_chat_template(str(error)) from None
    number = 1
    try:
        with chat_template.Renderer(chat_template.ChatTemplate(text, "", tokenizer.special_tokens_map)) as renderer:

            def render(row: int, messages: Any) -> str:
                nonlocal number
                number = row
                return renderer.render(messages)

            yield render
    except chat_template.TemplateProblem as problem:
        raise problem.error(_template_file(tokenizer), hint=TEXT_INSTEAD, row=number) from None


def _template_file(tokenizer: Any) -> str:
    found = chat_template.find(Path(tokenizer.name_or_path))
    return found.file if found else "its chat template"


def no_chat_template(why: str = "It is probably a base model, which has never seen dialogue.") -> UsageError:
    """The error for rows of messages and a tokenizer without a chat template."""
    return UsageError(
        "The calibration rows are messages, and this model's tokenizer has no chat template.",
        why=why,
        hint=TEXT_INSTEAD,
    )


def first_rows(part: schema.Calibration, use: Use = CALIBRATION) -> list[dict[str, Any]]:
    """The rows of a local or bundled file, before any work; none of a Hub dataset. UsageError if there is no file."""
    file = local_file(part.data, use)
    return read_jsonl(file, part.samples, part.column).usable if file else []


def check_conversations(rows: Iterable[Mapping[str, Any]], directory: Path) -> None:
    """UsageError, before any weight is read, for rows of messages that the model has no usable chat template for."""
    if not any("messages" in row for row in rows):
        return
    found = tokenizer_files.read(directory)
    if found.template is None:
        raise no_chat_template()
    if found.template_problem is not None and found.template_problem.kind != "refused":
        raise found.template_problem.error(found.template.file, hint=TEXT_INSTEAD)


def read_rows(calibration: Calibration) -> Iterator[dict[str, Any]]:
    """The rows of a finished calibration."""
    with open(calibration.path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
