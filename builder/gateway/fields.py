"""The fields of OpenAI's requests that this gateway ignores or refuses. All others that it does not know are errors.

An ignored field changes nothing about the answer that a client could rely on. A refused one would: an answer that
silently lacks what was asked for is worse than an error. A test compares these lists with the openai package's types.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from builder.gateway.errors import ApiError, invalid

IGNORED = (
    "metadata", "moderation", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user", "verbosity",
)  # fmt: skip
# Field -> (values that ask for nothing, what it would need)
REFUSED: Mapping[str, tuple[Collection[Any], str]] = {
    "audio": ((), "audio"),
    "functions": (([],), "functions, the deprecated form of tools"),
    "function_call": (("none", "auto"), "functions, the deprecated form of tools"),
    "modalities": ((["text"],), "output other than text"),
    "suffix": (("",), "models that fill in the middle of a text"),
    "web_search_options": ((), "web search"),
}


def known(
    body: Mapping[str, Any],
    fields: Collection[str],
    ignored: Collection[str] = IGNORED,
    refused: Mapping[str, tuple[Collection[Any], str]] = REFUSED,
) -> dict[str, Any]:
    """The fields of a request that have an effect. Null means that a field is absent, as in OpenAI's API.

    ApiError for a refused field, or one that is none of `fields` (a misspelt one would be ignored silently).
    """
    found = {}
    for name, value in body.items():
        if name in fields:
            if value is not None:
                found[name] = value
        elif name in refused:
            neutral, what = refused[name]
            if value is not None and value not in neutral:
                raise invalid(f"This server does not support {what}: omit {name}.", name, "unsupported_parameter")
        elif name not in ignored:
            raise _unknown(name, [*fields, *ignored, *refused])
    return found


def _unknown(name: str, names: Collection[str]) -> ApiError:
    name = name[:100]  # a name may be as long as the body, and comparing it would hold up every client
    close = difflib.get_close_matches(name, names, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return invalid(f"Unrecognized request argument supplied: {name}.{hint}", name, "unknown_parameter")
