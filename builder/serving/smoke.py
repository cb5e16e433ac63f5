"""Asks a served repository every way that there is, and asserts what must come back. Works on any of our repositories.

The client, and with it tritonclient, is imported when a test begins.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core.errors import ServingError
from builder.core.output import Output, seconds
from builder.core.store import Store, library_versions, sources_digest
from builder.machine.gpus import visible
from builder.recipe.target_facts import target_facts

if TYPE_CHECKING:
    from builder.triton.repository import Repository


SOURCES = (
    "builder/serving/smoke.py",
    "builder/serving/smoke_checks.py",
    "builder/serving/smoke_prompts.py",
    "builder/serving/client.py",
    "builder/serving/server.py",
    "builder/llmapi/launch.py",
    "builder/serving/safe_links.py",
    "builder/serving/private_directory.py",
    "builder/serving/installation.py",
    "builder/trtllm/compatibility.py",
    "builder/reference",
    "builder/recipe/target_facts.py",
    "builder/formats/arithmetic/nvfp4.py",
    "builder/checkpoint/sharding.py",
    "builder/checkpoint/layouts.py",
    "builder/core/safetensors_io.py",
    "builder/model/files.py",
)

LIBRARIES = (
    "tritonclient",
    "nvidia-pytriton",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "tensorrt_llm",
    "tensorrt",
)


DETAIL = 400  # characters of a check's detail: enough to see what is wrong


@dataclass(frozen=True)
class Check:
    """One assertion: `detail` says what was seen, what is wrong, or (`passed` None) why it could not be checked."""

    name: str
    passed: bool | None
    detail: str
    seconds: float


@dataclass(frozen=True)
class Sample:
    """What the model said."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class SmokeReport:
    """All checks of one test, and the sample where it came so far."""

    checks: tuple[Check, ...]
    sample: Sample | None = None

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    @property
    def unchecked(self) -> list[Check]:
        """What this model gave no occasion to check."""
        return [check for check in self.checks if check.passed is None]

    @property
    def counts(self) -> str:
        """ "14 of 16 passed, 2 not checked"."""
        passed = len(self.checks) - len(self.failed) - len(self.unchecked)
        rest = [(self.failed, "failed"), (self.unchecked, "not checked")]
        return ", ".join([f"{passed} of {len(self.checks)} passed", *(f"{len(c)} {what}" for c, what in rest if c)])

    def check(self) -> None:
        """Raises SmokeFailed naming the failed checks."""
        if self.failed:
            raise SmokeFailed(self)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": not self.failed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SmokeReport:
        sample = data.get("sample")
        return cls(tuple(Check(**check) for check in data["checks"]), Sample(**sample) if sample else None)


class SmokeFailed(ServingError):
    """Exit code 5; `report` holds every check."""

    def __init__(self, report: SmokeReport) -> None:
        super().__init__(
            f"{len(report.failed)} of {len(report.checks)} smoke checks failed.",
            why="\n".join(f"{check.name}: {check.detail}" for check in report.failed),
            hint="Serve it and ask it yourself: builder serve REPOSITORY",
        )
        self.report = report


def smoke_test(repository: Repository, *, store: Store) -> SmokeReport:
    """Serves the repository, tests it and stops it. A repository that passed is not tested again."""
    from builder.serving.server import serve

    on_gpu = target_facts(repository.facts["target"]).needs_gpu
    ingredients = {
        "repository": repository.digest,
        # The repository's files name its engine and do not hold it; its key follows from the engine's content.
        "key": repository.path.name,
        "libraries": library_versions(*LIBRARIES),
        "gpus": [asdict(gpu) for gpu in visible() or []] if on_gpu else [],
        "sources": sources_digest(*SOURCES),
    }

    def make(directory: Path) -> Mapping[str, Any]:
        with serve(repository.models, out=store.out, log=store.log("tritonserver")) as server:
            report = smoke(server.http_url, server.grpc_url, repository.facts, out=store.out)
        (directory / "report.json").write_text(json.dumps(report.as_dict(), indent=2), encoding="utf-8")
        write_junit(report, directory / "junit.xml")
        report.check()
        return report.as_dict()

    return SmokeReport.from_dict(store.stage("smoke", ingredients, make).facts)


def smoke(
    http_url: str, grpc_url: str, facts: Mapping[str, Any], *, out: Output, timeout: float = 120.0
) -> SmokeReport:
    """Every check on a running server, in order. `timeout` is for one answer, or one piece of a stream."""
    from builder.serving.client import Client
    from builder.serving.smoke_checks import READY, Checks

    asked = Checks(Client.for_repository(http_url, grpc_url, facts, timeout), facts)
    named = asked.named()
    checks: list[Check] = []
    with out.progress("smoke test", total=len(named), unit="checks") as bar:
        for name, function in named.items():
            checks.append(_run(name, function))
            bar.update(len(checks), label=name)
            if checks[-1].passed is None:
                out.info(f"not checked: {name}: {checks[-1].detail}")
            elif not checks[-1].passed:
                out.warn(f"smoke check failed: {name}: {checks[-1].detail}")
                if name == READY:
                    break  # nobody is there to ask
    report = SmokeReport(tuple(checks), Sample(*asked.sample) if asked.sample else None)
    out.info(f"smoke checks: {report.counts}, in {seconds(sum(c.seconds for c in checks))}")
    return report


def write_junit(report: SmokeReport, path: Path) -> None:
    """The report as JUnit XML, which every CI system shows."""
    from xml.etree import ElementTree

    suite = ElementTree.Element(
        "testsuite",
        name="smoke",
        tests=str(len(report.checks)),
        failures=str(len(report.failed)),
        errors="0",
        skipped=str(len(report.unchecked)),
        time=f"{sum(check.seconds for check in report.checks):.3f}",
    )
    for check in report.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=__name__, name=check.name, time=f"{check.seconds:.3f}"
        )
        detail = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in check.detail)
        kind = {True: "system-out", False: "failure", None: "skipped"}[check.passed]
        element = ElementTree.SubElement(case, kind)
        element.text = detail
        if not check.passed:
            element.set("message", detail)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _run(name: str, function: Callable[[], str]) -> Check:
    """A check that breaks has failed: the others still run."""
    from builder.serving.smoke_prompts import NotChecked, Wrong, short

    start = time.monotonic()
    passed: bool | None
    try:
        detail, passed = function(), True
    except NotChecked as unchecked:
        detail, passed = str(unchecked), None
    except Wrong as wrong:
        detail, passed = str(wrong), False
    except Exception as error:
        detail, passed = f"{type(error).__name__}: {error}", False
    return Check(name, passed, short(detail, DETAIL), round(time.monotonic() - start, 3))
