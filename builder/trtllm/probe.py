"""`builder probe`: builds a two-layer engine on this machine's card for each flag whose support is in doubt.

A probe shows only that an engine builds; the engine is not run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.core import process
from builder.core.errors import StageError, UnsupportedError, UsageError
from builder.core.output import seconds
from builder.core.store import Store, disk_error, library_versions
from builder.formats import kv_cache
from builder.machine import gpus
from builder.recipe import schema
from builder.trtllm import engine, probe_results, probe_store
from builder.trtllm import flags as trtllm_flags
from builder.trtllm import versions as trtllm_versions
from builder.trtllm.probe_results import FAILS, UNKNOWN, WORKS, Answer, Probe
from builder.trtllm.probe_store import Container, holds

TIME_LIMIT = 1800  # seconds; a generous guess: no two-layer engine was timed on a card
SIZES = {"max_batch_size": 4, "max_input_len": 256, "max_seq_len": 512, "max_num_tokens": 512}
# Answers depend on warnings (cpp/tensorrt_llm/common/logger.cpp, tensorrt_llm/logger.py).
LOG_LEVEL = {"TLLM_LOG_LEVEL": "INFO"}
MODEL = {"head_size": 128, "kv_cache_dtype": "fp8", "architecture": "Qwen3ForCausalLM"}


@dataclass
class Session:
    """A run of probes on one card. force: repeat those that have an answer, once."""

    container: Container
    card: gpus.Seen
    gpu: str
    store: Store
    limit: float = TIME_LIMIT
    force: bool = False
    _asked: set[str] = field(default_factory=set)

    @property
    def file(self) -> Path:
        """The file that stores the answers of this card and container."""
        return self.container.file(self.store.root)

    def known(self, probe: Probe) -> dict[str, Any] | None:
        """The stored answer to this probe, or None. An `unknown` one does not count: the probe runs again."""
        if self.force and probe.name not in self._asked:
            return None
        record = probe_store.read(self.file).get(probe.name)
        return record if record and holds(record, probe) and record["outcome"] != UNKNOWN else None

    def ask(self, probe: Probe, base: Mapping[str, str]) -> dict[str, Any]:
        """Builds the engine of a probe and returns the record, which is not stored yet."""
        self._asked.add(probe.name)
        version = trtllm_versions.load(self.container.tensorrt_llm)
        log, start = self.store.log(f"probe-{probe.name}"), time.monotonic()
        with _working(self.file.with_name(f".{self.container.name}.tmp")) as work:
            argv = command(probe, base, self.gpu, version.version, work)
            failed = None
            try:
                run_command = process.Command(argv, env={**gpus.cuda_order(), **LOG_LEVEL}, cwd=work)
                process.run(run_command, log=log, limit=self.limit)
                engine.check_built(work / "engine", version.version, 1)
            except StageError as error:
                failed = error
        outcome, reason = judge(log.read_text(errors="replace"), failed, probe, version)
        took = time.monotonic() - start
        self.store.out.stage("probe", f"{probe.name}: {outcome} ({seconds(took)})")
        return {
            "asked": probe.asked(),
            "outcome": outcome,
            "reason": reason,
            "card": self.card.name,
            "driver": self.card.driver,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(took, 1),
            "command": argv,
            "log": str(log),
        }

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Builds one engine at a time: a concurrent probe of this container waits and then finds the answer."""
        with self.store.locked("probe", self.container.name):
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise disk_error(error, self.file) from error
            yield


def session(gpu: str, store: Store, *, limit: float = TIME_LIMIT, force: bool = False) -> Session:
    """A session for a GPU profile or `auto`. UnsupportedError unless this machine has that card and trtllm-build."""
    if limit <= 0:
        raise UsageError(f"An engine can't be built in {limit} s.", hint=f"--time-limit {TIME_LIMIT}")
    named = None if gpu == "auto" else gpus.named(gpu)
    if named and named.sm is None:
        raise UnsupportedError(f"{gpu} has no probes: it builds no engine.", hint="builder probe --gpu sm120")
    try:
        card = gpus.first()
    except UnsupportedError as error:
        raise UnsupportedError(
            "No GPU is visible, and a probe builds an engine on a GPU.",
            why=error.why,
            hint="Run it on the machine that will build. `builder plan` uses the tables until then.",
        ) from error
    profile = named or gpus.for_capability(card.major, card.minor, card.name)
    if profile.sm != card.sm:
        raise UnsupportedError(
            f"{profile.name} was asked for, and this machine's {card.name} is sm{card.sm}.",
            why="A probe is valid only for the architecture that it ran on.",
            hint="Probe this card: builder probe --gpu auto",
        )
    if shutil.which("trtllm-build") is None:
        raise UnsupportedError(
            "trtllm-build is not on this machine's PATH, so no engine can be built to probe it.",
            hint="Run inside the image that will build: NVIDIA's Triton image with TensorRT-LLM.",
        )
    return Session(_container(card.sm), card, profile.name, store, limit, force)


def _container(sm: int) -> Container:
    found = library_versions("tensorrt_llm", "tensorrt")
    absent = [name for name, version in found.items() if version == "absent"]
    if absent:
        raise UnsupportedError(
            f"This Python does not have {' and '.join(absent)}, so it is unknown which versions an answer holds for.",
            hint="Install builder into the Python that trtllm-build runs in.",
        )
    trtllm_versions.load(found["tensorrt_llm"])  # UnsupportedError for a version without facts
    return Container(found["tensorrt_llm"], found["tensorrt"], sm)


def questions(asking: Session, only: Sequence[str] = ()) -> list[Probe]:
    """All probes for this card, or those named. UsageError for an unknown name."""
    found = probe_results.probes(trtllm_versions.load(asking.container.tensorrt_llm), asking.container.sm)
    names = [probe.name for probe in found]
    wrong = [name for name in only if name not in names]
    if wrong:
        raise UsageError(
            f"There is no probe {wrong[0]!r} for sm{asking.container.sm}.", why=f"The probes are: {', '.join(names)}."
        )
    return [probe for probe in found if not only or probe.name in only]


def run(asking: Session, wanted: Sequence[Probe]) -> dict[str, dict[str, Any]]:
    """Runs the probes that have no answer yet and stores each answer immediately. Returns the records by probe name.

    StageError if not even a plain engine builds: a failure then says nothing about a flag, and nothing is stored.
    """
    out, root, found = asking.store.out, asking.store.root, {}
    base = _base(asking) if any(asking.known(probe) is None for probe in wanted) else {}
    todo = sum(asking.known(probe) is None for probe in wanted)
    with out.progress("building engines of two layers", todo, "engines") as bar:
        done = 0
        for probe in wanted:
            with asking.turn():
                record = asking.known(probe)
                if record is None:
                    bar.update(done, label=probe.name)
                    record = asking.ask(probe, {} if probe.control else base)
                    probe_store.keep(root, asking.container, probe, record)
                    done += 1
            found[probe.name] = record
    return found


def _base(asking: Session) -> Mapping[str, str]:
    """The flags of the first control engine that builds on this machine."""
    root = asking.store.root
    failed: list[tuple[Probe, dict[str, Any]]] = []
    for probe in [probe for probe in questions(asking) if probe.control]:
        with asking.turn():
            record = asking.known(probe) or asking.ask(probe, {})
            if record["outcome"] != WORKS:
                failed.append((probe, record))
                continue
            for believed, answer in [*failed, (probe, record)]:
                probe_store.keep(root, asking.container, believed, answer)
            return probe.flags
    raise StageError(
        "Even a plain two-layer engine does not build here, so a failure would prove nothing about a flag.",
        why="\n".join(f"{probe.name}: {record['reason']}" for probe, record in failed),
        hint=f"No answer was stored. The full log: {failed[-1][1]['log'] if failed else '-'}",
    )


def command(probe: Probe, base: Mapping[str, str], gpu: str, version: str, work: Path) -> list[str]:
    """Writes the two-layer checkpoint to `work` and returns the trtllm-build command of the probe."""
    from builder.trtllm import probe_model

    model = {**MODEL, **probe.about}
    flags = {**base, **probe.built_with, **probe.flags}
    values = {
        "model.id": "probe",
        "gpu": gpu,
        "target": "engine",
        "engine.tensorrt_llm": version,
        "quantization.format": "nvfp4",  # of the two-layer model
        "quantization.kv_cache_dtype": model["kv_cache_dtype"],
        **{f"engine.{name}": value for name, value in SIZES.items()},
        **{f"engine.flags.{name}": value for name, value in flags.items()},
    }
    resolved = schema.resolve(values)
    config = probe_model.config(architecture=model["architecture"], head_size=model["head_size"])
    # The tables would reject some of these flags; here they are assumed to work.
    assumed = Answer(probe, resolved.gpu.sm or 0, WORKS, "", "", "")
    found = trtllm_flags.resolve(resolved, config, [assumed])
    layout = probe_model.write_checkpoint(config, work / "checkpoint", kv_cache.get(model["kv_cache_dtype"]))
    # A separate timing cache: with a shared one TensorRT would not try the tactics again.
    return trtllm_flags.command(found, checkpoint=layout, output=work / "engine", timing_cache=work / "model.cache")


def judge(log: str, failed: StageError | None, probe: Probe, version: trtllm_versions.Version) -> tuple[str, str]:
    """(outcome, reason) from the log and the error, if there was one. UNKNOWN if it proves nothing."""
    doubts, lines = version.probes, log.splitlines()

    def said(*texts: str) -> str | None:
        return next((line.strip()[:500] for line in lines if any(text in line for text in texts)), None)

    if failed is None:
        warned = said(probe.falls_back) if probe.falls_back else None
        return (FAILS, f"it builds, but: {warned}") if warned else (WORKS, "")
    if nothing := said(*doubts["proves_nothing"]):
        return UNKNOWN, nothing
    if not isinstance(failed, process.Failed) or failed.code is None:
        return UNKNOWN, failed.what
    if proof := said(*doubts["proves"]):
        return FAILS, proof
    if failed.code < 0:
        return UNKNOWN, failed.what
    return FAILS, failed.why or failed.what


@contextmanager
def _working(directory: Path) -> Iterator[Path]:
    """An empty directory for the block. What a killed probe left in it is removed first."""
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.mkdir(parents=True)
        yield directory
    except OSError as error:
        raise disk_error(error, directory) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def unanswered(found: Mapping[str, Mapping[str, Any]]) -> StageError | None:
    """The error for probes whose engines failed in a way that proves nothing; None if there are none."""
    names = [name for name, record in found.items() if record["outcome"] == UNKNOWN]
    if not names:
        return None
    return StageError(
        f"{len(names)} of {len(found)} probes have no answer: {', '.join(names)}.",
        why="\n".join(f"{name}: {found[name]['reason']} ({found[name]['log']})" for name in names[:5]),
        hint="Run them again when the card and its memory are free: builder probe. A plan uses the tables until then.",
    )


def show(asking: Session, found: Mapping[str, Mapping[str, Any]]) -> None:
    """The answers as a table, or with --json as one object."""
    out, on = asking.store.out, asking.container
    rows = [(name, r["outcome"], r["date"], (r["reason"].splitlines() or [""])[-1]) for name, r in found.items()]
    title = f"{asking.card.name}, TensorRT-LLM {on.tensorrt_llm}, TensorRT {on.tensorrt}: built, not run"
    out.table(title, ["question", "answer", "on", "why"], rows)
    out.result({"gpu": asking.gpu, "card": asking.card.name, **vars(on), "file": str(asking.file), "answers": found})
    if found:
        out.info("built, not run: the output of these engines was not checked")
        out.text(f"kept       {asking.file}")
        out.text(f"next       builder plan --model MODEL --gpu {asking.gpu} --output {asking.store.root}")
    else:
        out.info(f"nothing is in doubt for sm{on.sm}")
