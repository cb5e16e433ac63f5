"""What a trtllm-build flag means: its default in each version, the rules that touch it, the profiles that set it.

Likewise an argument of the LLM class (the llmapi target), which has no rules and profiles.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from builder.core.errors import UsageError
from builder.core.output import Output
from builder.llmapi import versions as llmapi_versions
from builder.machine import gpus
from builder.trtllm import versions as trtllm_versions
from builder.trtllm.versions import Version


def explain(flag: str) -> dict[str, Any]:
    """All that is known of a flag, by any spelling: --max_seq_len, max-seq-len, an alias, a removed one. UsageError
    with the nearest name for one that no version ever had."""
    name = flag.lstrip("-").replace("-", "_")
    known = [trtllm_versions.load(version) for version in trtllm_versions.versions()]
    name = _canonical(name, known)
    if not any(name in v.flags or name in v.removed for v in known) and (argument := _argument(name)):
        return argument
    newest = next((v for v in reversed(known) if name in v.flags), None)
    removed = next((v.removed[name] for v in reversed(known) if name in v.removed), None)
    if newest is None and removed is None:
        raise _unknown(flag, name, known)
    spec = newest.flags[name] if newest else {}
    return {
        "flag": f"--{name}",
        "meaning": spec.get("help", ""),
        "note": spec.get("notes", ""),
        "versions": {v.version: _in_version(v, name) for v in known},
        "removed": removed and {key: removed[key] for key in ("since", "use", "source")},
        "rules": [
            {"id": r["id"], "when": r["when"], "effect": r["effect"], "source": r["where"]}
            for r in (newest.rules.values() if newest else ())
            if name in r["flags"]
        ],
        "profiles": {p: gpus.load(p).flags[name].value for p in gpus.names() if name in gpus.load(p).flags},
        "sources": list(_sources(newest)) if newest else [],
    }


def _argument(name: str) -> dict[str, Any] | None:
    """The same of an LLM argument, with or without the recipe's prefix; None for a name that is none."""
    name = name.removeprefix("llmapi.args.")
    raw = llmapi_versions.read()
    if name not in raw["arguments"] and name not in raw["refused"]:
        return None
    versions, notes = {}, []
    for row in raw["versions"]:
        facts = llmapi_versions.load(row["first"])
        label = row["first"] if row["first"] == row["last"] else f"{row['first']} to {row['last']}"
        spec = facts.arguments.get(name)
        versions[label] = _taken(spec) if spec else None
        note = (spec or facts.others.get(name, {})).get("no_effect" if spec else "gone")
        notes += [f"{label}: {note}"] if note else []
    return {
        "flag": f"llmapi.args.{name}",
        "meaning": "an argument of TensorRT-LLM's LLM class, which the llmapi target calls",
        "note": f"not taken here: {raw['refused'][name]}" if name in raw["refused"] else "; ".join(notes),
        "versions": versions,
        "removed": None,
        "rules": [],
        "profiles": {},
        "sources": list(raw["states"].values()),
    }


def _taken(spec: Mapping[str, Any]) -> dict[str, Any]:
    of = spec.get("of")
    takes = spec.get("choices") or (f"a list of {of}s" if isinstance(of, str) else of) or spec["type"]
    if "or" in spec:
        takes = f"{takes} or {spec['or']}"
    return {"default": "unset" if spec["default"] is None else spec["default"], "takes": takes}


def _canonical(name: str, known: list[Version]) -> str:
    for version in known:
        for real, spec in version.flags.items():
            if f"--{name}" in spec.get("aliases", []):
                return real
    return name


def _in_version(version: Version, name: str) -> dict[str, Any] | None:
    if name not in version.flags:
        return None
    spec = version.flags[name]
    default = "unset" if spec["default"] in (None, "==SUPPRESS==") else spec["default"]
    takes = spec["choices"] or {"store_true": "a switch"}.get(spec["kind"], spec["kind"])
    return {"default": default, "takes": takes}


def _sources(version: Version) -> tuple[str, ...]:
    raw = version.sources
    return tuple(text for key, text in raw.items() if key != "confidence")


def _unknown(flag: str, name: str, known: list[Version]) -> UsageError:
    names = {name for version in known for name in (*version.flags, *version.removed)}
    names |= set(llmapi_versions.read()["arguments"])
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    return UsageError(
        f"No version of trtllm-build that is known here has a flag {flag!r}, and no LLM class such an argument.",
        why=f"Did you mean {', '.join(n if '.' in n else f'--{n}' for n in near)}?" if near else "",
        hint=f"Known versions: {', '.join(v.version for v in known)}.",
    )


def show(found: Mapping[str, Any], out: Output) -> None:
    """For people: a paragraph and three tables. With --json: the same as one object."""
    out.text(f"{found['flag']}: {found['meaning']}".rstrip(": "))
    if found["note"]:
        out.text(found["note"])
    if found["removed"]:
        gone = found["removed"]
        out.text(f"removed in {gone['since']}; what replaced it: {gone['use'] or 'nothing'} ({gone['source']})")
    rows = [(v, f["default"], _words(f["takes"])) if f else (v, "absent", "") for v, f in found["versions"].items()]
    out.table("in each version of TensorRT-LLM", ["version", "default", "takes"], rows)
    rules = [(r["id"], r["when"], r["effect"], r["source"]) for r in found["rules"]]
    if rules:
        out.table("rules", ["rule", "when", "what trtllm-build does", "source"], rules)
    if found["profiles"]:
        out.table("GPU profiles that set it", ["profile", "value"], found["profiles"].items())
    for source in found["sources"]:
        out.text(f"source: {source}")
    out.result(dict(found))


def _words(takes: Any) -> str:
    return ", ".join(takes) if isinstance(takes, list) else str(takes)
