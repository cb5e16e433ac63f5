"""The worker process that renders an untrusted chat template: python -m builder.tokenizer.chat_template_worker

A template is a program: it can loop forever or double a string until memory is full. The kernel's limits end it here
(RLIMIT_CPU, RLIMIT_AS). Requests and responses are lines of JSON on stdin and stdout: first {"template", "variables"},
then {"messages", ...} for each conversation. A response is {"text"} or {"error": kind, "why"}.

The Jinja environment is that of transformers 4.57 and 5 (utils/chat_template_utils.py, _compile_jinja_template) with a
fixed date unless a request has one: some templates write today's, and calibration would give another result every day.
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

MEMORY = 1 << 30  # bytes, in addition to what the process uses when it starts
LONGEST = 1 << 24  # characters of a rendered conversation
TODAY = datetime(2025, 1, 1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Generation(Extension):
    """The {% generation %} block, which marks the assistant's text for training. Renders its content."""

    tags = {"generation"}  # noqa: RUF012 - so jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Parses the block; called by jinja2."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return str(caller())


def environment() -> ImmutableSandboxedEnvironment:
    """A sandbox: no attributes that begin with "_", no ranges over 100,000, no changes to the messages."""
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
    """A compiled chat template with the variables of every rendering, such as bos_token."""

    def __init__(self, text: str, variables: Mapping[str, Any]) -> None:
        self._variables = dict(variables)
        self._template = environment().from_string(text)

    def render(self, messages: Any, *, add_generation_prompt: bool = False, today: str = "", **variables: Any) -> str:
        """The text of a conversation. `today`: a date in ISO format, for templates that write one. `variables`:
        additional ones for this rendering."""
        always: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        if today:
            always["strftime_now"] = datetime.fromisoformat(today).strftime
        return self._template.render(messages=messages, **{**self._variables, **always, **variables})


def limit_memory(allowance: int = MEMORY) -> None:
    """Limits the address space to what is in use now plus `allowance` bytes. Disables core dumps."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, used + allowance)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time(seconds: int = CPU_SECONDS) -> None:
    """Limits CPU time to `seconds` from now on; then the kernel sends SIGXCPU, which ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds + 1)


def _limit(kind: int, value: int) -> None:
    """Sets the soft limit, to the hard limit if the user has set a lower one."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent exits, even if that is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def check_length(text: str) -> str:
    """Returns the text. MemoryError if it is longer than LONGEST."""
    if len(text) > LONGEST:
        raise MemoryError
    return text


def error_response(error: BaseException) -> dict[str, str]:
    """The response for an exception while compiling or rendering: {"error": kind of TemplateProblem, "why"}."""
    if isinstance(error, MemoryError):
        return {
            "error": "memory",
            "why": f"more than {MEMORY >> 20} MiB, or a text of more than {LONGEST:,} characters",
        }
    if isinstance(error, TemplateSyntaxError):
        return {"error": "syntax", "why": f"line {error.lineno}: {error.message}"}
    if isinstance(error, RecursionError):
        return {"error": "endless", "why": "it calls itself forever"}
    if isinstance(error, OverflowError):  # the sandbox raises it for ranges over 100,000
        return {"error": "endless", "why": str(error)}
    return {"error": "refused", "why": f"{type(error).__name__}: {error}"[:500]}


def main() -> int:
    """Responds to each line of stdin. Exits if the first one, the template, can't be compiled."""
    die_with_parent()
    responses = os.fdopen(os.dup(1), "w", encoding="utf-8")
    limit_memory()
    template: Template | None = None
    for line in sys.stdin:
        request = json.loads(line)
        limit_time()
        try:
            if template is None:
                template = Template(request["template"], request["variables"])
                response: dict[str, Any] = {"text": ""}
            else:
                response = {"text": check_length(template.render(**request))}
            text = json.dumps(response)
        except Exception as error:
            text = json.dumps(error_response(error))
        responses.write(text + "\n")
        responses.flush()
        if template is None:
            return 0
    return 0


if __name__ == "__main__":
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(main())
