"""The smoke test: calls every endpoint of a served repository and checks the answers. For repositories of any target.

The client, and with it tritonclient, is imported only when a test starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core.errors import ServingError
from builder.core.output import Output, seconds
from builder.core.store import Store, library_versions, sources_digest
from builder.machine.gpus import visible
from builder.recipe.target_facts import target_facts
from builder.serving.sources import SERVED_SOURCES

if TYPE_CHECKING:
    from builder.triton.repository import Repository


SOURCES = (
    *SERVED_SOURCES,
    "builder/serving/smoke.py",
    "builder/serving/smoke_checks.py",
    "builder/serving/smoke_prompts.py",
    "builder/triton/adapter_files.py",
    "builder/lora/adapter.py",
    "builder/lora/cache.py",
    "builder/lora/modules.py",
    "builder/lora/tensors.py",
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


DETAIL = 400  # maximum characters of a check's detail


@dataclass(frozen=True)
class Check:
    """The result of one check. `passed` is None if it could not be checked.

    `detail` says what was seen, what is wrong, or why it was not checked.
    """

    name: str
    passed: bool | None
    detail: str
    seconds: float


@dataclass(frozen=True)
class Sample:
    """A prompt and the model's answer, for people to look at."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class SmokeReport:
    """The results of all checks, and the sample if the server got as far as an answer."""

    checks: tuple[Check, ...]
    sample: Sample | None = None

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.passed is False]

    @property
    def unchecked(self) -> list[Check]:
        """The checks that could not be made with this model."""
        return [check for check in self.checks if check.passed is None]

    @property
    def counts(self) -> str:
        """ "14 of 16 passed, 2 not checked"."""
        passed = len(self.checks) - len(self.failed) - len(self.unchecked)
        rest = [(self.failed, "failed"), (self.unchecked, "not checked")]
        return ", ".join([f"{passed} of {len(self.checks)} passed", *(f"{len(c)} {what}" for c, what in rest if c)])

    def check(self) -> None:
        """Raises SmokeFailed, with the failed checks, if there are any."""
        if self.failed:
            raise SmokeFailed(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the checks, the sample, and `passed` for the whole test."""
        return {**asdict(self), "passed": not self.failed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SmokeReport:
        """The inverse of `as_dict`."""
        sample = data.get("sample")
        return cls(tuple(Check(**check) for check in data["checks"]), Sample(**sample) if sample else None)


class SmokeFailed(ServingError):
    """A check failed (exit code 5). `report` has the results of all checks."""

    def __init__(self, report: SmokeReport) -> None:
        super().__init__(
            f"{len(report.failed)} of {len(report.checks)} smoke checks failed.",
            why="\n".join(f"{check.name}: {check.detail}" for check in report.failed),
            hint="Serve the repository and send requests yourself: builder serve REPOSITORY",
        )
        self.report = report


def smoke_test(repository: Repository, *, store: Store) -> SmokeReport:
    """Serves the repository, tests it and stops the server. A test that passed is cached in the store.

    SmokeFailed if a check failed, ServingError if the server does not start.
    """
    from builder.serving.server import serve

    on_gpu = target_facts(repository.facts["target"]).needs_gpu
    ingredients = {
        "repository": repository.digest,
        # The digest covers the path of the engine and not its content. The key covers the content too.
        "key": repository.path.name,
        "libraries": library_versions(*LIBRARIES),
        "gpus": [asdict(gpu) for gpu in visible() or []] if on_gpu else [],
        "sources": sources_digest(*SOURCES),
    }

    def make(directory: Path) -> Mapping[str, Any]:
        with serve(repository.models, out=store.out, log=store.log("tritonserver")) as server:
            urls = server.http_url, server.grpc_url
            report = smoke(*urls, repository.facts, out=store.out, models=repository.models)
        (directory / "report.json").write_text(json.dumps(report.as_dict(), indent=2), encoding="utf-8")
        write_junit(report, directory / "junit.xml")
        report.check()
        return report.as_dict()

    return SmokeReport.from_dict(store.stage("smoke", ingredients, make).facts)


def smoke(
    http_url: str,
    grpc_url: str,
    facts: Mapping[str, Any],
    *,
    out: Output,
    timeout: float = 120.0,
    models: Path | None = None,
) -> SmokeReport:
    """Runs all checks on a running server, in order.

    URLs have no scheme, `facts` are the repository's, `timeout` is in seconds for a response or a chunk of a stream.
    `models`: the directory that Triton serves, if it is on this machine.
    """
    from builder.serving.client import Client
    from builder.serving.smoke_checks import READY, Checks

    suite = Checks(Client.for_repository(http_url, grpc_url, facts, timeout), facts, models)
    named = suite.named()
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
                    break  # no other check can pass
    report = SmokeReport(tuple(checks), Sample(*suite.sample) if suite.sample else None)
    out.info(f"smoke checks: {report.counts}, in {seconds(sum(c.seconds for c in checks))}")
    return report


def smoke_models(http_url: str, grpc_url: str, repository: Repository, *, out: Output) -> SmokeReport:
    """`smoke` for each model of a repository."""
    members, models = repository.members, repository.models
    if list(members) == [""]:
        return smoke(http_url, grpc_url, members[""], out=out, models=models)
    checks, sample = [], None
    for name, facts in members.items():
        report = smoke(http_url, grpc_url, facts, out=out, models=models)
        checks += [replace(check, name=f"{name}: {check.name}") for check in report.checks]
        sample = sample or report.sample
    return SmokeReport(tuple(checks), sample)


def write_junit(report: SmokeReport, path: Path) -> None:
    """Writes the report as JUnit XML, which CI systems display."""
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
    """Runs one check. An exception is a failed check, so that the other checks still run."""
    from builder.serving.smoke_prompts import CheckFailed, NotChecked, short

    start = time.monotonic()
    passed: bool | None
    try:
        detail, passed = function(), True
    except NotChecked as unchecked:
        detail, passed = str(unchecked), None
    except CheckFailed as failed:
        detail, passed = str(failed), False
    except Exception as error:
        detail, passed = f"{type(error).__name__}: {error}", False
    return Check(name, passed, short(detail, DETAIL), round(time.monotonic() - start, 3))
