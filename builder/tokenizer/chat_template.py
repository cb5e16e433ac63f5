"""Finds a model's chat template and renders it safely. Imports neither jinja2 nor transformers.

A template is an untrusted program, so a worker process with limits renders it (chat_template_worker).
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
CPU_SECONDS = 3  # per conversation; real templates take about a millisecond
WALL_SECONDS = 60.0  # per conversation; RLIMIT_CPU does not end a stuck process that uses no CPU time
# The variables that a worker gets. Templates can't read the environment, unless the sandbox has a bug.
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "TMPDIR")
OPEN = "CONTINUE_FINAL_MESSAGE_TAG "  # the marker that transformers uses (utils/chat_template_utils.py)
DESCRIPTIONS = {
    "syntax": "can't be parsed",
    "refused": "rejects the conversation",
    "endless": "does not end",
    "memory": "needs too much memory",
    "crashed": "crashed its interpreter",
}


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja source, the file that it comes from, and its variables: special tokens such as bos_token."""

    text: str
    file: str
    variables: Mapping[str, Any] = field(default_factory=dict)


class TemplateProblem(Exception):
    """A conversation could not be rendered.

    `kind`: a key of DESCRIPTIONS. `why`: the cause, such as the template's own error message.
    """

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{DESCRIPTIONS[kind]}: {why}")
        self.kind, self.why = kind, why

    def error(self, file: str, *, hint: str, row: int | None = None) -> UsageError:
        """The error for the user, with the template's file and, if given, the number of the calibration row."""
        problem = DESCRIPTIONS[self.kind]
        if row is not None:
            rejected = self.kind == "refused"
            problem = f"rejects calibration row {row}" if rejected else f"{problem} (calibration row {row})"
        return UsageError(f"The chat template of this model ({file}) {problem}.", why=self.why, hint=hint)


def find(directory: Path) -> ChatTemplate | None:
    """The template that transformers uses by default, or None. IntegrityError if it is not a text.

    chat_template.jinja takes precedence over tokenizer_config.json (tokenization_utils_base.py, _from_pretrained),
    which may contain one text or a list of named ones.
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
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
        if len(named) != len(found) or not all(isinstance(text, str) for text in named.values()):
            raise _not_text(directory / CONFIG, "chat_template is a list, but not of named texts")
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise _not_text(directory / CONFIG, f"chat_template is a {type(found).__name__}")
    return _template(found or "", CONFIG, variables)


def _template(text: str, file: str, variables: Mapping[str, Any]) -> ChatTemplate | None:
    return ChatTemplate(text, file, variables) if text.strip() else None


def _token(key: str, value: Any) -> str | None:
    """The text of a special token, which is a string or an object with `content`."""
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
    return IntegrityError(
        f"The chat template in {path} is not a text.", why=why, hint="Download or save the model again."
    )


class Renderer:
    """A worker process that renders one template, as a context manager. Time is limited for each conversation."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    def __enter__(self) -> Renderer:
        self._child = start_worker(workers.CHAT_TEMPLATE, stdin=subprocess.PIPE)
        try:
            self._request({"template": self.template.text, "variables": dict(self.template.variables)})
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._child.poll() is not None

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation. `variables`: what else the template can read, and `today` (a date in ISO format).

        TemplateProblem if it fails.
        """
        return self._request({**variables, "messages": list(messages), "add_generation_prompt": add_generation_prompt})

    def render_open(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text up to the end of the last message, for a model that continues it.

        Like `continue_final_message` of transformers: a marker is appended to the message, and the text is cut there.
        TemplateProblem if rendering fails or the template drops the marker.
        """
        *before, last = messages
        text = self.render([*before, {**last, "content": last["content"] + OPEN}], **variables)
        cut, found, rest = text.rpartition(OPEN.strip())
        if not found:
            raise TemplateProblem("refused", "it drops the end of the last message, which the model should continue")
        # If the template strips messages, the space at the marker's end is gone, and so is the message's own.
        return cut if rest.startswith(OPEN[len(OPEN.strip()) :]) else cut.rstrip()

    def _request(self, request: Mapping[str, Any]) -> str:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise TemplateProblem("crashed", "its process exited") from None
        response = read_response(self._child)
        if "error" in response:
            raise TemplateProblem(response["error"], response["why"])
        return str(response["text"])


def start_worker(module: str, *arguments: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Starts a worker that limits its own resources and writes responses as lines of JSON; stderr is discarded."""
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
    """The worker's next response. If it exits or takes `wall` seconds: {"error": kind of TemplateProblem, "why"}."""
    stdout: IO[bytes] | None = child.stdout
    assert stdout is not None
    ready, _, _ = select.select([stdout], [], [], wall)
    line = stdout.readline() if ready else b""
    if line:
        response: dict[str, Any] = json.loads(line)
        return response
    if not ready:
        child.kill()
        child.wait()
        return {"error": "endless", "why": f"it was stopped after {wall:.0f} s"}
    code = child.wait()
    if code == -signal.SIGXCPU:
        return {"error": "endless", "why": f"it was stopped after {CPU_SECONDS} s of CPU time"}
    return {"error": "crashed", "why": f"it {exit_status.describe(code)}"}
