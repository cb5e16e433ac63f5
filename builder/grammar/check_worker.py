"""The worker process that compiles grammars that clients send: python -m builder.grammar.check_worker FILE VOCAB_SIZE

An engine compiles a grammar in the loop that serves everyone, so this process does it before, within limits of time and
memory. Requests and responses are lines of JSON: {"kind", "text"}, then {} or {"error": "refused", "why"}. The first
response, before any request, says that the process is ready.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from builder.grammar.guides import Guide
from builder.grammar.matching import NOT_INSTALLED, Compiler
from builder.tokenizer.chat_template_worker import die_with_parent, limit_memory

MEMORY = 2 << 30  # bytes, in addition to what the process uses once it is ready


def main(file: Path, vocab_size: int) -> int:
    """Responds to each line of stdin."""
    die_with_parent()
    responses = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what xgrammar prints is no response

    def respond(why: str = "") -> None:
        responses.write(json.dumps({"error": "refused", "why": why} if why else {}) + "\n")
        responses.flush()

    try:
        compiler = Compiler(file, vocab_size)
    except ModuleNotFoundError:
        respond(NOT_INSTALLED)
        return 1
    limit_memory(MEMORY)
    respond()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            compiler.compile(Guide(request["kind"], request["text"]))
        except ValueError as error:
            respond(str(error) or "it can't be compiled")
        except MemoryError:
            respond("it needs too much memory")
        else:
            respond()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
