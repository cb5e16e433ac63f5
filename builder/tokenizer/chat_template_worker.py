"""Renders a chat template that somebody else wrote, with limits: python -m builder.tokenizer.chat_template_worker

A template is a program: it can loop for ever or double a string until the memory is full. Here the kernel ends it
(RLIMIT_CPU, RLIMIT_AS). Requests and answers are lines of JSON on stdin and stdout: first {"template", "variables"},
then {"messages", ...} for each conversation. An answer is {"text"} or {"error": kind, "why"}.
The environment is that of transformers 4.57 and 5 (utils/chat_template_utils.py, _compile_jinja_template), but for the
clock: a date that a template writes would make each day's calibration another one.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from builder.tokenizer.chat_template import CPU_SECONDS

MEMORY = 1 << 30  # bytes beyond what the process has when it starts
LONGEST = 1 << 24  # characters of a conversation's text
TODAY = datetime(2025, 1, 1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Generation(Extension):
    """{% generation %} marks what the assistant says, for those who train. The text is the block's."""

    tags = {"generation"}  # noqa: RUF012 - so jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return str(caller())


def environment() -> ImmutableSandboxedEnvironment:
    """A sandbox: no attributes that begin with "_", no ranges above 100,000, no changes to the messages."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = TODAY.strftime
    return made


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


class Template:
    """A chat template with the variables that every rendering sees, as bos_token."""

    def __init__(self, text: str, variables: Mapping[str, Any]) -> None:
        self._variables = dict(variables)
        self._template = environment().from_string(text)

    def render(self, messages: Any, *, add_generation_prompt: bool = False, **more: Any) -> str:
        """The text of a conversation; `more` are variables that this one rendering sees."""
        always = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return self._template.render(messages=messages, **{**self._variables, **always, **more})


def limit_memory(more: int = MEMORY) -> None:
    """No more than `more` bytes of address space beyond what is in use. A core dump would help nobody."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, used + more)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time(seconds: int = CPU_SECONDS) -> None:
    """From now on: after `seconds` more of CPU time the kernel sends SIGXCPU, which ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds + 1)


def _limit(kind: int, value: int) -> None:
    """Sets the soft limit; a hard one of the user's own may be lower, and stays."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def die_with_parent() -> None:
    """The kernel ends this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def check_length(text: str) -> str:
    """The text, if a parent can take it. MemoryError otherwise."""
    if len(text) > LONGEST:
        raise MemoryError
    return text


def error_response(error: BaseException) -> dict[str, str]:
    """What went wrong, as an answer: the template can't be parsed, refuses these messages, or takes all memory."""
    if isinstance(error, MemoryError):
        return {
            "error": "memory",
            "why": f"more than {MEMORY >> 20} MiB, or a text of more than {LONGEST:,} characters",
        }
    if isinstance(error, TemplateSyntaxError):
        return {"error": "syntax", "why": f"line {error.lineno}: {error.message}"}
    if isinstance(error, RecursionError):
        return {"error": "endless", "why": "it calls itself without end"}
    if isinstance(error, OverflowError):  # of the sandbox: a range above 100,000
        return {"error": "endless", "why": str(error)}
    return {"error": "refused", "why": f"{type(error).__name__}: {error}"[:500]}


def main() -> int:
    """Answers each line of stdin until it ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    limit_memory()
    template: Template | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        limit_time()
        try:
            if template is None:
                template = Template(asked["template"], asked["variables"])
                told: dict[str, Any] = {"text": ""}
            else:
                told = {"text": check_length(template.render(**asked))}
            answer = json.dumps(told)
        except Exception as error:
            answer = json.dumps(error_response(error))
        answers.write(answer + "\n")
        answers.flush()
        if template is None:
            return 0
    return 0


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(main())
