"""Worker process that reads a Hub dataset: python -m builder.calibration.hub_dataset '{"job": "rows", "repo": ...}'

Streams with the `datasets` library (3.1 to 5.x), pinned to a commit: downloads only what the first rows need.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from builder.calibration.rows import Rows, collect, dump
from builder.core.errors import UnsupportedError, UsageError
from builder.core.worker import emit
from builder.hub.cache import Job, drop_damaged_cached
from builder.hub.download import report
from builder.hub.errors import gated_error, with_retries
from builder.hub.guard import DEADLINE, endpoint


def rows(job: dict[str, Any]) -> dict[str, Any]:
    """Writes the first usable rows to job["file"]: {"unusable": {row number: reason}}."""
    datasets.disable_progress_bars()
    drop_damaged_cached(Job("rows", job["repo"], commit=job["commit"], kind="dataset"))
    found: Rows = with_retries(lambda: collect(_numbered(job), job["samples"], job["column"]), job["waits"])
    Path(job["file"]).write_bytes(dump(found.usable))
    return {"unusable": found.unusable}


def _numbered(job: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, row in enumerate(_stream(job), 1):
        DEADLINE.begin(job["limit"])  # per row: a large file may have to be downloaded before the first
        emit(progress={"label": "rows", "done": number - 1, "total": job["samples"]})
        yield number, row


def _stream(job: dict[str, Any]) -> Any:
    repo, config, split = job["repo"], job["config"], job["split"]
    # Before 4.0 a dataset could be a script, and the library would ask on the terminal whether to run it.
    refuse = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
    try:
        return datasets.load_dataset(repo, config, split=split, streaming=True, revision=job["commit"], **refuse)
    except datasets.exceptions.DatasetNotFoundError as error:
        # The exception has no causes, so its text is all there is. The dataset itself exists, since it was resolved;
        # a commit that the recipe names is requested here for the first time.
        if "gated" in str(error):
            raise gated_error("dataset", repo) from None
        if "Revision" in str(error):
            raise UsageError(
                f"The dataset {repo} has no revision {job['commit']}.",
                why=f"So says {endpoint()}.",
                hint="Name another: " + job["hint"].format(key="revision", value="main"),
            ) from None
        raise
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if "script" in said:
            raise UnsupportedError(
                f"The dataset {repo} is a Python script, and code of datasets is never run.",
                why=said[:300],
                hint="Many datasets have a converted branch: "
                + job["hint"].format(key="revision", value="refs/convert/parquet"),
            ) from None
        if "onfig" in said:
            hint = "Name one: " + job["hint"].format(key="config", value="NAME")
        elif "split" in said:
            hint = "Name one: " + job["hint"].format(key="split", value="NAME")
        else:
            raise
        raise UsageError(f"The dataset {repo} can't be read like this.", why=said[:400], hint=hint) from None
    except (datasets.exceptions.DataFilesNotFoundError, datasets.data_files.EmptyDatasetError) as error:
        raise UsageError(
            f"The dataset {repo} has no files that can be read.", why=" ".join(str(error).split())
        ) from None


def main(arguments: str) -> int:
    """Runs the job and reports errors as events; returns the exit code."""
    job = json.loads(arguments)
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    return report(lambda: rows(job), "dataset", job["repo"], job["revision"], job["limit"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
