"""Searches for the settings with the highest goodput: each trial renders a repository, serves it and runs AIPerf."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from builder import pipeline
from builder.aiperf import measure, target, workload
from builder.aiperf.environment import Environment
from builder.aiperf.environment import version as aiperf_version
from builder.aiperf.measured import Measurement
from builder.aiperf.workload import Workload
from builder.core import process, temporary
from builder.core.errors import BuilderError, StageError, UnsupportedError, UsageError
from builder.core.locks import serving_lock
from builder.core.output import Output
from builder.core.store import Store
from builder.preflight.prepare import prepare
from builder.recipe.schema import Resolved
from builder.recipe.target_facts import LLMAPI
from builder.serving import container
from builder.serving.container import ContainerServer
from builder.serving.server import Server, serve
from builder.triton.repository import Repository, check_served, repository_key
from builder.tune import suggest
from builder.tune.space import Parameter, Value, check_value, flags, settings_of, spoken

STAGE = "tuning"


@dataclass(frozen=True)
class Trial:
    """Settings and what AIPerf measured with them; `error` if they could not be built or served."""

    settings: Mapping[str, Value]
    measurement: Measurement | None = None
    cached: bool = False
    error: str = ""

    @property
    def value(self) -> float | None:
        """Good requests per second at the best load or, without an objective, output tokens per second."""
        if self.measurement is None:
            return None
        rated = self.measurement.objective is not None
        return max((p.goodput or 0.0) if rated else p.tokens_per_second for p in self.measurement.points)


@dataclass(frozen=True)
class Request:
    """What to search. `route` completes the workload for the rendered repository: with the model's route.

    image: serves it in a container of this image instead of on this machine.
    """

    parameters: tuple[Parameter, ...]
    workload: Workload
    trials: int
    route: Callable[[Workload, Repository], Workload]
    image: str = ""


def check(resolved: Resolved, request: Request, store: Store) -> None:
    """Rejects what can't be searched here, or a workload that does not fit, before anything is installed or built."""
    recipe = resolved.recipe
    if request.trials < 1:
        raise UsageError(f"--trials must be at least 1 (got {request.trials}).", hint="--trials 12")
    for one in request.parameters:
        for value in one.values:
            resolved.changed(flags({one.name: value}))  # UsageError for a value that the recipe can't have
            check_value(recipe, one.name, value)
    sizes = {"max_input_len": recipe.engine.max_input_len, "max_seq_len": recipe.engine.max_seq_len}
    workload.check(request.workload, {**sizes, "decoupled": recipe.repository.decoupled})
    _check_machine(resolved, request, store)
    image_id(resolved, request)


def _check_machine(resolved: Resolved, request: Request, store: Store) -> None:
    """UnsupportedError if this machine can't make the trials or, without an image, serve them."""
    try:
        pipeline.check_target(resolved, store, "repository" if request.image else "smoke")
    except UnsupportedError as error:
        if request.image or resolved.recipe.target != LLMAPI.name:
            raise
        hint = f"Serve the trials in Triton's image: --container. {error.hint}"
        raise UnsupportedError(error.what, why=error.why, hint=hint) from error


def image_id(resolved: Resolved, request: Request) -> str:
    """The id of the image that serves the trials; "" without one. UsageError without Docker or such an image,
    IntegrityError for one that can't serve this recipe."""
    if not request.image:
        return ""
    recipe = resolved.recipe
    facts = {"target": recipe.target, "tensorrt_llm": recipe.engine.tensorrt_llm}
    client = container.connect()
    try:
        return container.check_image(client, request.image, facts)
    finally:
        client.close()


def search(resolved: Resolved, request: Request, place: Environment, *, store: Store) -> list[Trial]:
    """The trials in order; the first has the recipe's own settings and raises what fails in it."""
    out = store.out
    trials: list[Trial] = []
    request = replace(request, image=image_id(resolved, request))  # the same one in all trials, whatever is tagged
    while len(trials) < request.trials:
        settings = _next(resolved, request, trials, place)
        if settings is None:
            out.info("every combination was tried")
            break
        out.info(f"trial {len(trials) + 1} of {request.trials}: {spoken(settings)}")
        try:
            trials.append(_trial(resolved, settings, request, place, store if not trials else _quiet(store)))
        except BuilderError as error:
            if not trials:
                raise
            out.warn(f"{spoken(settings)}: {error.what}")
            trials.append(Trial(settings, error=error.what))
        _tell(trials[-1], out)
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """The one with the highest value; of equal ones the first."""
    return max(trials, key=lambda trial: -1.0 if trial.value is None else trial.value)


def _quiet(store: Store) -> Store:
    """The same store, without a line for every cached stage."""
    return Store(store.root, Output("quiet"))


def _tell(trial: Trial, out: Output) -> None:
    if trial.value is not None and trial.measurement is not None:
        unit = "good requests/s" if trial.measurement.objective else "tokens/s"
        out.info(f"  {trial.value:.3f} {unit}" + ", measured before" * trial.cached)


def _trial(
    resolved: Resolved, settings: Mapping[str, Value], request: Request, place: Environment, store: Store
) -> Trial:
    changed = resolved.changed(flags(settings))
    pipeline.check_target(changed, store, "repository")
    built = pipeline.run_stages(prepare(changed, store, layouts=True), store, "repository")
    assert built.repository is not None
    repository = built.repository
    asked = request.route(request.workload, repository)
    workload.check(asked, repository.facts)
    loads = [asdict(load) for load in asked.loads]
    ingredients = {
        "repository": repository.digest,
        "key": repository_key(repository),
        "workload": {**asked.as_dict(), "loads": loads},
        "aiperf": aiperf_version(),
        **({"image": request.image} if request.image else {}),
    }

    def make(directory: Path) -> dict[str, Any]:
        facts = _measured(repository, asked, place, request.image, store.out).as_dict()
        (directory / "aiperf.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        return facts

    made = store.stage(STAGE, ingredients, make)
    return Trial(settings, Measurement.from_dict(made.facts), made.cached)


def _measured(repository: Repository, asked: Workload, place: Environment, image: str, out: Output) -> Measurement:
    check_served(repository)
    with (
        serving_lock(repository.path),
        _server(repository, image, out) as server,
        target.in_front(server, repository, asked) as served,
    ):
        return measure.measure(place, served, asked, out=out)


def _server(repository: Repository, image: str, out: Output) -> AbstractContextManager[Server | ContainerServer]:
    return container.serve_container(repository, out=out, image=image) if image else serve(repository.models, out=out)


def _next(resolved: Resolved, request: Request, trials: Sequence[Trial], place: Environment) -> dict[str, Value] | None:
    """The recipe's own settings first, then what Optuna suggests; None if everything was tried."""
    if not trials:
        return settings_of(resolved.recipe, request.parameters)
    values = {one.name: one.values for one in request.parameters}
    known = [trial for trial in trials if all(trial.settings[name] in values[name] for name in values)]
    told = {
        "sizes": {name: len(found) for name, found in values.items()},
        "trials": [
            {"indices": {name: values[name].index(trial.settings[name]) for name in values}, "value": trial.value}
            for trial in known
        ],
        "seed": request.workload.seed,
    }
    indices = _suggested(told, place)
    return None if indices is None else {name: values[name][indices[name]] for name in values}


def _suggested(told: Mapping[str, Any], place: Environment) -> dict[str, int] | None:
    with temporary.directory() as directory:
        (directory / "told.json").write_text(json.dumps(told), encoding="utf-8")
        script = 'exec "$0" "$1" < told.json > said.json'
        argv = ["/bin/sh", "-c", script, str(place.python), str(Path(suggest.__file__).resolve())]
        try:
            process.run(process.Command(argv, cwd=directory), log=directory / "optuna.log")
            found: dict[str, int] | None = json.loads((directory / "said.json").read_text(encoding="utf-8"))["indices"]
        except (process.Failed, OSError, ValueError, KeyError) as error:
            why = process.tail(directory / "optuna.log")
            raise StageError("Optuna suggested no settings.", why=why) from error
    return found
