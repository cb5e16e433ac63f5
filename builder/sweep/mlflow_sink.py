"""A sweep's results in MLflow, for those who keep their experiments there: a run for each point.

MLflow is imported only where it is asked for (the extra `mlflow`). A point that is unchanged keeps its run. The run of
one that was measured again is deleted, so that it can be restored, and a new one takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from builder.core.errors import StageError, UsageError
from builder.core.manifest import digest_of
from builder.sweep import results
from builder.sweep.measured import Result
from builder.sweep.results import AXIS, FLOATS, Row

POINT, DIGEST, RESULTS = "sweep.point", "sweep.digest", "sweep.results"  # tags
LONGEST = 500  # characters of a parameter, which MLflow limits


class Sink:
    """A tracking server, or a local directory, and the experiment of one sweep.

    UsageError, before anything runs, if MLflow is not installed, nothing answers at the address, or the experiment was
    deleted there."""

    def __init__(self, address: str, title: str) -> None:
        local = urlsplit(address).scheme in ("", "file")
        if "@" in urlsplit(address).netloc:
            raise UsageError(
                "The address of --mlflow holds a user name or a password.",
                hint="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead.",
            )
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        if local:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow 3 wants a database
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise UsageError("MLflow is not installed.", why=str(error), hint="pip install mlflow-skinny") from None
        self._refused = MlflowException
        self._client: Any = MlflowClient(Path(address).absolute().as_uri() if "://" not in address else address)
        try:
            found = self._client.get_experiment_by_name(title)
            self._experiment: str = found.experiment_id if found else self._client.create_experiment(title)
        except MlflowException as error:
            raise UsageError(
                f"There is no MLflow at {address}.", why=_first_line(error), hint="--mlflow URL or DIRECTORY"
            ) from None
        if found and found.lifecycle_stage == "deleted":
            raise UsageError(
                f"The experiment {title!r} was deleted in this MLflow, which takes no runs for it.",
                hint=f"Restore it: mlflow experiments restore --experiment-id {self._experiment}. Or change the title "
                "of the sweep.",
            )

    def log(self, found: Sequence[Result], directory: Path) -> int:
        """Logs the points that are new or changed. directory: of the results. Returns how many were logged.

        StageError if the server refuses, and the next sweep logs what is missing."""
        try:
            return self._log_changed(found, directory)
        except self._refused as error:
            raise StageError(
                "MLflow did not take the results.",
                why=_first_line(error),
                hint=f"They are in {directory}. The same command logs them again; nothing is measured twice.",
            ) from None

    def _log_changed(self, found: Sequence[Result], directory: Path) -> int:
        there = {run.data.tags.get(POINT): run for run in self._runs(directory)}
        changed = 0
        for one in found:
            rows = results.rows(one)
            digest = digest_of([{key: value for key, value in row.items() if key != "finished"} for row in rows])
            old = there.get(one.point.slug)
            if old is not None and old.data.tags.get(DIGEST) == digest:
                continue
            tags = {POINT: one.point.slug, RESULTS: directory.as_uri()}
            self._log(one, rows, tags, digest)
            if old is not None:
                self._client.delete_run(old.info.run_id)
            changed += 1
        return changed

    def _runs(self, directory: Path) -> list[Any]:
        """The runs of these results."""
        asked = f"tags.`{RESULTS}` = '{directory.as_uri()}'"
        found, token = [], None
        while True:
            page = self._client.search_runs([self._experiment], asked, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _log(self, one: Result, rows: Sequence[Row], tags: Mapping[str, str], digest: str) -> None:
        """A run. The digest comes last: a run that was killed before has none, so the next sweep logs it again."""
        link = one.served.link if one.served else None
        more = {"sweep.report": str(tags[RESULTS]) + "/report.html"} | ({"sweep.repository": str(link)} if link else {})
        run = self._client.create_run(self._experiment, run_name=one.point.name, tags={**tags, **more}).info.run_id
        first = rows[0]
        params = {name.removeprefix(AXIS): value for name, value in first.items() if name.startswith(AXIS)}
        for name, value in {**params, "model": first["model"], "recipe": first["recipe"]}.items():
            self._client.log_param(run, _name(name), str(value)[:LONGEST])
        for name, number in _metrics(rows).items():
            self._client.log_metric(run, name, number)
        for name in ("verdict", "why"):
            self._client.set_tag(run, f"sweep.{name}", str(first[name]) or "-")
        self._client.log_text(run, one.point.recipe_file, "recipe.yaml")
        self._client.set_tag(run, DIGEST, digest)
        self._client.set_terminated(run, "FAILED" if one.why else "FINISHED")


def _first_line(error: Exception) -> str:
    """What the error says, or else what it is."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _metrics(rows: Sequence[Row]) -> dict[str, float]:
    """{data set/figure: value}, with the ends of intervals under _low and _high, and bytes and seconds."""
    found = {name: float(rows[0][name]) for name in ("bytes", "seconds") if rows[0].get(name) is not None}
    for row in rows:
        for name in FLOATS:
            if name != "seconds" and row.get(name) is not None:
                found[_name(f"{row['name']}/{name}")] = float(row[name])
    return found


def _name(text: str) -> str:
    """Without the characters that MLflow refuses in names of metrics and parameters."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in text).strip("/") or "_"
