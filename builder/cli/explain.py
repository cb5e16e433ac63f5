"""Explains what decisions rest on: a trtllm-build flag, an argument of the LLM class, or a rule.

A flag has its default in each version, the rules that involve it and the GPU profiles that set it. A rule (R01, R02...)
says what trtllm-build does with some combination of flags, model and GPU; a few rules involve no flag at all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from builder.core.errors import UsageError
from builder.core.output import Output
from builder.llmapi import versions as llmapi_versions
from builder.machine import gpus
from builder.trtllm import versions as trtllm_versions
from builder.trtllm.versions import Version

# What `kind` in rules.json means.
KINDS = {
    "error": "refused",
    "override": "changed silently or with a warning",
    "default": "default filled in",
    "warn": "warning",
    "noop": "ignored",
    "noise": "harmless message",
    "fallback": "another implementation is used",
    "env": "environment variable",
}


def explain_rule(name: str) -> dict[str, Any]:
    """Everything known about a rule, in each version of TensorRT-LLM. UsageError for an id that no version has."""
    known = {version: trtllm_versions.load(version).rules for version in trtllm_versions.versions()}
    rule = name.upper()
    if not any(rule in rules for rules in known.values()):
        raise UsageError(f"There is no rule {rule}.", hint="`builder explain --rules` lists them all.")
    return {"rule": rule, "versions": {v: _rule(rules[rule]) if rule in rules else None for v, rules in known.items()}}


def all_rules() -> dict[str, Any]:
    """Every rule of the newest version of TensorRT-LLM, also those that involve no flag."""
    newest = trtllm_versions.load(trtllm_versions.versions()[-1])
    return {"version": newest.version, "rules": [{"id": id, **_rule(rule)} for id, rule in newest.rules.items()]}


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "when": rule["when"],
        "effect": rule["effect"],
        "kind": rule["kind"],
        "flags": list(rule["flags"]),
        "note": rule.get("note", ""),
        "source": rule["where"],
    }


def is_rule(name: str) -> bool:
    """Whether `name` looks like the id of a rule."""
    return re.fullmatch(r"[rR]\d+", name) is not None


def explain(flag: str) -> dict[str, Any]:
    """Everything known about a flag or an LLM argument, in any spelling: --max_seq_len, max-seq-len, an alias.

    UsageError, with the nearest names, for one that no version ever had.
    """
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
    """The same for an LLM argument, with or without the recipe's prefix. None if there is no such argument."""
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
        "note": f"refused here: {raw['refused'][name]}" if name in raw["refused"] else "; ".join(notes),
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
        f"{flag!r} is neither a flag of trtllm-build nor an argument of the LLM class, in any known version.",
        why=f"Did you mean {', '.join(n if '.' in n else f'--{n}' for n in near)}?" if near else "",
        hint=f"Known versions: {', '.join(v.version for v in known)}. Rules: `builder explain --rules`.",
    )


def show(found: Mapping[str, Any], out: Output) -> None:
    """Prints what `explain` found: a paragraph and tables, or one object with --json."""
    out.text(f"{found['flag']}: {found['meaning']}".rstrip(": "))
    if found["note"]:
        out.text(found["note"])
    if found["removed"]:
        gone = found["removed"]
        out.text(f"removed in {gone['since']}; replaced by: {gone['use'] or 'nothing'} ({gone['source']})")
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


def show_rule(found: Mapping[str, Any], out: Output) -> None:
    """Prints what `explain_rule` found: the rule in each group of versions that have the same text."""
    out.text(found["rule"])
    same: dict[str, list[str]] = {}
    rules = {}
    for version, rule in found["versions"].items():
        text = repr(rule)
        same.setdefault(text, []).append(version)
        rules[text] = rule
    for text, versions in same.items():
        rule = rules[text]
        rows = [("absent", "")] if rule is None else _rule_rows(rule)
        out.table(f"TensorRT-LLM {', '.join(versions)}", ["fact", "value"], rows)
    out.result(dict(found))


def _rule_rows(rule: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("when", rule["when"]),
        ("what trtllm-build does", rule["effect"]),
        ("kind", KINDS.get(rule["kind"], rule["kind"])),
        ("flags", ", ".join(f"--{flag}" for flag in rule["flags"]) or "none"),
        ("note", rule["note"]),
        ("source", rule["source"]),
    ]
    return [row for row in rows if row[1]]


def show_rules(found: Mapping[str, Any], out: Output) -> None:
    """Prints what `all_rules` found as one table."""
    rows = [
        (r["id"], ", ".join(r["flags"]) or "none", r["when"], r["effect"], KINDS.get(r["kind"], r["kind"]))
        for r in found["rules"]
    ]
    columns = ["rule", "flags", "when", "what trtllm-build does", "kind"]
    out.table(f"rules of TensorRT-LLM {found['version']}", columns, rows)
    out.result(dict(found))
