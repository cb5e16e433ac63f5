"""Starts a server of the llmapi target: the command for one or several ranks, the environment, and its checks.

Files named in comments are in NVIDIA/TensorRT-LLM. Upstream documents contradict each other on this: see notes.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.core.errors import ServingError
from builder.core.untrusted_text import parse_yaml
from builder.trtllm import compatibility

WRAPPER = "trtllm-llmapi-launch"
ALWAYS = "BUILDER_LLMAPI_LAUNCH"  # "1": by the wrapper, also where one rank needs none
OVERLAY = "BUILDER_LLMAPI_OVERLAY"  # a directory of packages for the model's process alone, set by our Dockerfile
NO_USAGE = "TRTLLM_NO_USAGE_STATS"
OPT_OUTS = (NO_USAGE, "TELEMETRY_DISABLED", "DO_NOT_TRACK")  # tensorrt_llm/usage/usage_lib.py@03fa4799
# What tells a process that it is a rank of some MPI job, whose LLM class then can't start ranks of its own
# (triton_backend/all_models/llmapi/tensorrt_llm/1/model.py@044a90d2). MPI's own settings stay: OMPI_MCA_*, PMIX_MCA_*.
JOB = frozenset(
    [f"OMPI_{name}" for name in ("UNIVERSE_SIZE", "FIRST_RANKS", "APP_CTX_NUM_PROCS", "COMM_WORLD_SIZE",
     "COMM_WORLD_RANK", "COMM_WORLD_LOCAL_SIZE", "COMM_WORLD_LOCAL_RANK", "COMM_WORLD_NODE_RANK")]
    + [f"PMIX_{name}" for name in ("RANK", "NAMESPACE", "SERVER_URI", "SERVER_URI2", "SERVER_URI21", "SERVER_URI3",
       "SERVER_TMPDIR", "SYSTEM_TMPDIR", "SECURITY_MODE", "GDS_MODULE", "BFROPS_MODULE", "PTL_MODULE", "VERSION",
       "HOSTNAME")]
    + [f"PMI_{name}" for name in ("RANK", "SIZE", "FD", "SPAWNED", "APPNUM", "ID")]
    # The wrapper takes these for the rank before it looks at Open MPI's (trtllm-llmapi-launch@020c89e6).
    + ["SLURM_PROCID", "SLURM_NTASKS"]
)  # fmt: skip
JOB_PREFIXES = ("OMPI_MCA_orte_", "ORTE_")
CURE = (
    "Build our image again (docker compose build build), which has a newer openai beside the image's own, or: "
    f"pip install --no-deps --target DIRECTORY openai==1.109.1, and {OVERLAY}=DIRECTORY"
)
# 0: nothing is wrong, or there is no TensorRT-LLM here. Only what TensorRT-LLM names itself is asked of openai.
CHECK = """
import importlib.util, pathlib, sys
package = importlib.util.find_spec("tensorrt_llm")
places = package.submodule_search_locations if package else None
files = [f for place in places or () for f in pathlib.Path(place, "serve").glob("*.py")]
if any("PartReasoningText" in f.read_text("utf-8", "replace") for f in files):
    try:
        from openai.types.responses.response_content_part_added_event import PartReasoningText
    except ImportError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


def arguments(models: Path) -> Mapping[str, Any] | None:
    """The content of the repository's model.yaml, the first of several; None for a repository of another target."""
    for prefix in compatibility.prefixes(models):
        file = models / f"{prefix}{compatibility.ENGINE_MODEL}" / "1" / "model.yaml"
        if file.is_file():
            found: Mapping[str, Any] = parse_yaml(file.read_bytes())
            return found
    return None


def world_size(models: Path) -> int:
    """The number of ranks of a repository of the llmapi target; 1 for one of another target."""
    given = arguments(models) or {}
    return int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1))


def command(servers: Sequence[list[str]]) -> list[str]:
    """The command line that starts a server with these ranks.

    One rank is started directly, unless BUILDER_LLMAPI_LAUNCH asks for the wrapper.

    Several are started as in upstream's CI: the wrapper runs once per rank, as the server on the first and as a worker
    on the others (tests/integration/defs/triton_server/test_triton_llmapi.py@222982db,
    triton_backend/scripts/launch_triton_server.py@0a2e2c1f). ServingError where one of the programs is missing.
    """
    if len(servers) == 1 and os.environ.get(ALWAYS) != "1":
        return servers[0]
    wrapper, mpirun = _programs(len(servers))
    spaced = next((word for server in servers for word in server if any(c.isspace() for c in word)), None)
    if spaced is not None:
        raise ServingError(
            f"{spaced!r} has a space, and {WRAPPER} takes a command line apart at spaces.",
            hint="Serve a copy of the repository whose path has none.",
        )
    ranks = [[wrapper, *server] for server in servers]
    if len(ranks) == 1:
        return ranks[0]
    first, *rest = [["-n", "1", *rank] for rank in ranks]
    return [mpirun, "--allow-run-as-root", "--oversubscribe", *first, *(word for rank in rest for word in (":", *rank))]


def _programs(ranks: int) -> tuple[str, str]:
    """The wrapper's path and, for several ranks, mpirun's."""
    needed = [WRAPPER, "mpirun"] if ranks > 1 else [WRAPPER]
    found = {name: shutil.which(name) for name in needed}
    missing = [name for name in needed if found[name] is None]
    if missing:
        what = f"{ranks} ranks are" if ranks > 1 else "This server is"
        raise ServingError(
            f"{what} started by {' and '.join(needed)}, and {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not on the PATH.",
            hint="Serve it in NVIDIA's Triton image with TensorRT-LLM, which brings both.",
        )
    return str(found[WRAPPER]), str(found.get("mpirun"))


def environment(models: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server of this repository, from `given`.

    For the llmapi target it has no variables of an MPI job, disables usage data unless model.yaml enables it, and adds
    the packages that TensorRT-LLM needs. ServingError if TensorRT-LLM cannot be imported with it.
    """
    asked = arguments(models)
    if asked is None:
        return dict(given)
    made = without_job(given)
    made |= {name: os.environ[name] for name in OPT_OUTS if name in os.environ}
    if (asked.get("telemetry_config") or {}).get("disabled") is not False:
        made.setdefault(NO_USAGE, "1")
    overlay = os.environ.get(OVERLAY, "")
    made.pop(OVERLAY, None)
    wrong = import_error(made)
    if wrong and overlay and Path(overlay).is_dir():
        made = with_overlay(made, overlay)
        wrong = import_error(made)
    if wrong:
        raise ServingError(
            "TensorRT-LLM can't be imported here: the installed openai package is too old for it.",
            why=f"{wrong}. NVIDIA's Triton images 26.03 to 26.07 ship openai 1.107.3; the name came with 1.108.1.",
            hint=CURE,
        )
    return made


def without_job(variables: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in variables.items() if k not in JOB and not k.startswith(JOB_PREFIXES)}


def with_overlay(variables: Mapping[str, str], overlay: str) -> dict[str, str]:
    """The environment with the packages in this directory before the installed ones."""
    path = os.pathsep.join([overlay, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))])
    return {**variables, OVERLAY: overlay, "PYTHONPATH": path}


def import_error(variables: Mapping[str, str]) -> str:
    """Why TensorRT-LLM cannot be imported with this environment, "" if it can. A child process tries it."""
    python = shutil.which("python3", path=variables.get("PATH"))
    if python is None:
        return ""
    # Not where we are: Python looks for packages there first.
    done = subprocess.run([python, "-c", CHECK], env=dict(variables), cwd="/", capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
