"""configs/cluster: what Slurm and KubeRay start is a command that the builder takes, with options that Ray has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.cli import main

pytestmark = pytest.mark.any_version
EXAMPLES = Path("configs/cluster")
# The keys that the example has, all of them in KubeRay's schema of ray.io/v1 RayJob: it was checked with that
# of kuberay@feeaf72 (ray-operator/config/crd/bases/ray.io_rayjobs.yaml).
KEYS: dict[str, Any] = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"},
    "spec.rayClusterSpec": {"rayVersion", "headGroupSpec", "workerGroupSpecs"},
    "spec.rayClusterSpec.headGroupSpec": {"rayStartParams", "template"},
}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    return found


def test_the_ray_job_has_the_keys_of_kuberays_schema() -> None:
    for place, known in KEYS.items():
        part = job()
        for name in filter(None, place.split(".")):
            part = part[name]
        assert set(part) == known, place
    cluster = job()["spec"]["rayClusterSpec"]
    assert set(cluster["workerGroupSpecs"][0]) == WORKERS
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        mounted = {mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    pinned = re.search(r"^ray==(.+)$", Path("requirements/cpu.txt").read_text(), re.MULTILINE)
    assert pinned
    assert cluster["rayVersion"] == pinned[1]


def test_their_commands_are_the_builders() -> None:
    entrypoint = shlex.split(job()["spec"]["entrypoint"])
    script = (EXAMPLES / "slurm.sbatch").read_text().replace("\\\n", " ")
    [line] = re.findall(r" -- (builder sweep .*)$", script, re.MULTILINE)
    by_slurm = shlex.split(line.replace('"$@"', "configs/sweeps/algorithms.yaml --model Qwen/Qwen3-8B"))
    for argv in (entrypoint, by_slurm):
        assert argv[0] == "builder"
        assert main.parser().parse_args(argv[1:]).on == "auto"


def test_ray_has_what_they_use() -> None:
    from ray.scripts.scripts import cli

    commands = [cli.commands[name] for name in ("symmetric-run", "start")]
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    script = (EXAMPLES / "slurm.sbatch").read_text().replace("\\\n", " ")
    [line] = re.findall(r"ray symmetric-run (.*) -- builder", script)
    starts = [one["rayStartParams"] for one in [job()["spec"]["rayClusterSpec"]["headGroupSpec"],
                                                *job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]]]  # fmt: skip
    for option in {*re.findall(r"--[a-z-]+", line), *(f"--{name}" for one in starts for name in one)}:
        assert option in known, option
