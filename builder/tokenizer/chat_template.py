"""A model's chat template: where it is, and rendering it without trusting it. Imports neither jinja2 nor transformers.

The template is somebody else's program, so a child process with limits runs it (chat_template_worker).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from builder.core import exit_status, process, workers
from builder.core.errors import IntegrityError, UsageError
from builder.core.untrusted_text import parse_json, read_regular

FILE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
CPU_SECONDS = 3  # for one conversation; a real template takes about a millisecond
WALL_SECONDS = 60.0  # for one conversation: a stuck child that uses no CPU time is not ended by RLIMIT_CPU
# What a child needs of the environment. A template sees none of it, but a bug in the sandbox would.
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR")
OPEN = "CONTINUE_FINAL_MESSAGE_TAG "  # the word that transformers looks for (utils/chat_template_utils.py)
DESCRIPTIONS = {
    "syntax": "can't be parsed",
    "refused": "rejects the conversation",
    "endless": "does not end",
    "memory": "needs too much memory",
    "crashed": "crashed its interpreter",
}


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source, the file that it comes from, and the special tokens that it can write, as bos_token."""

    text: str
    file: str
    variables: Mapping[str, Any] = field(default_factory=dict)


class TemplateProblem(Exception):
    """Why a conversation could not be rendered: `kind` is a key of SAYS, `why` what the template itself said."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{DESCRIPTIONS[kind]}: {why}")
        self.kind, self.why = kind, why

    def error(self, file: str, *, hint: str, row: int | None = None) -> UsageError:
        """As what a user reads, with the template's file and the calibration row that it was rendered for."""
        says = DESCRIPTIONS[self.kind]
        if row is not None:
            says = f"refuses calibration row {row}" if self.kind == "refused" else f"{says} (calibration row {row})"
        return UsageError(f"The chat template of this model ({file}) {says}.", why=self.why, hint=hint)


def find(directory: Path) -> ChatTemplate | None:
    """The template that transformers takes by default, or None. IntegrityError for one that is no text.

    chat_template.jinja goes before tokenizer_config.json (tokenization_utils_base.py, _from_pretrained), where it is a
    text or a list of named ones.
    """
    config = _json(directory / CONFIG)
    variables = {key: token for key, value in config.items() if (token := _token(key, value)) is not None}
    variables |= {k: t for k, v in _json(directory / "special_tokens_map.json").items() if (t := _token(k, v))}
    path = directory / FILE
    if path.is_file():
        try:
            return _template(path.read_text(encoding="utf-8"), FILE, variables)
        except (OSError, UnicodeDecodeError) as error:
            raise _not_text(path, str(error)) from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}
        if len(named) != len(found) or not all(isinstance(text, str) for text in named.values()):
            raise _not_text(directory / CONFIG, "chat_template is a list of something else than named texts")
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise _not_text(directory / CONFIG, f"chat_template is a {type(found).__name__}")
    return _template(found or "", CONFIG, variables)


def _template(text: str, file: str, variables: Mapping[str, Any]) -> ChatTemplate | None:
    return ChatTemplate(text, file, variables) if text.strip() else None


def _token(key: str, value: Any) -> str | None:
    """The text of a special token, which the files hold alone or with its properties."""
    if not key.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is absent or something else (tokenizer_files rejects those)."""
    try:
        found = parse_json(read_regular(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _not_text(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"The chat template in {path} is no text.", why=why, hint="Fetch or save the model again.")


class Renderer:
    """A process that renders one template: a context manager. Each conversation has its own limit of time."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    def __enter__(self) -> Renderer:
        self._child = start_worker(workers.CHAT_TEMPLATE, stdin=subprocess.PIPE)
        try:
            self._ask({"template": self.template.text, "variables": dict(self.template.variables)})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **more: Any) -> str:
        """The text of a conversation; `more` are variables that the template sees. TemplateProblem if there is none."""
        return self._ask({**more, "messages": list(messages), "add_generation_prompt": add_generation_prompt})

    def render_open(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """The text up to the end of the last message, which goes on: `continue_final_message` of transformers."""
        *before, last = messages
        text = self.render([*before, {**last, "content": last["content"] + OPEN}], **more)
        cut, found, rest = text.rpartition(OPEN.strip())
        if not found:
            raise TemplateProblem("refused", "it leaves out the end of the last message, which is to go on")
        return cut if rest.startswith(OPEN[len(OPEN.strip()) :]) else cut.rstrip()

    def _ask(self, asked: Mapping[str, Any]) -> str:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(asked).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise TemplateProblem("crashed", "its process ended") from None
        told = read_response(self._child)
        if "error" in told:
            raise TemplateProblem(told["error"], told["why"])
        return str(told["text"])


def start_worker(module: str, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """A child that limits itself, answers in lines of JSON on stdout and keeps its errors to itself."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return subprocess.Popen(
        [process.python(), "-m", module, *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parents[2],
        env={**environment, "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,
    )


def read_response(child: subprocess.Popen[bytes], wall: float = WALL_SECONDS) -> dict[str, Any]:
    """The next line that the child writes; what its end means, where it ended instead."""
    stdout: IO[bytes] | None = child.stdout
    assert stdout is not None
    ready, _, _ = select.select([stdout], [], [], wall)
    line = stdout.readline() if ready else b""
    if line:
        told: dict[str, Any] = json.loads(line)
        return told
    if not ready:
        child.kill()
        child.wait()
        return {"error": "endless", "why": f"it was stopped after {wall:.0f} s"}
    code = child.wait()
    if code == -signal.SIGXCPU:
        return {"error": "endless", "why": f"it was stopped after {CPU_SECONDS} s of CPU time"}
    return {"error": "crashed", "why": f"it {exit_status.describe(code)}"}
