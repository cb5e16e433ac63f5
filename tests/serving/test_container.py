"""What can be tested about serving in a container without a Docker engine; tests/docker has the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from builder.core.errors import ServingError, UnsupportedError
from builder.serving import container as serving_container


def connect(before: str = "", **environment: str) -> str:
    """The error of connect(), in a process of its own: the SDK leaks a socket if no engine answers."""
    code = (
        f"import sys\n{before}\nfrom builder.serving import container as serve_container\n"
        "try: serve_container.connect()\n"
        "except serve_container.UsageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_missing_engine_is_reported(tmp_path: Path) -> None:
    message = connect(DOCKER_HOST=f"unix://{tmp_path}/no.sock")
    assert message.startswith("No Docker engine answers.\n")
    assert "systemctl start docker" in message


def test_the_sdk_is_needed_only_to_connect() -> None:
    assert "pip install 'trtllm-builder[container]'" in connect("sys.modules['docker'] = None")


@pytest.mark.parametrize(
    ("message", "kind", "what"),
    [
        (
            'could not select device driver "nvidia" with capabilities: [[gpu]]',
            UnsupportedError,
            "cannot give the container a GPU",
        ),
        ("driver failed ...: Bind for 127.0.0.1:8000 failed: port is already allocated", ServingError, "is in use"),
        ("no space left on device", ServingError, "does not start"),
    ],
)
def test_errors_of_the_engine_are_explained(message: str, kind: type[Exception], what: str) -> None:
    error = serving_container._start_error(message)
    assert type(error) is kind
    assert what in error.what
    assert message in error.why


def test_the_store_is_mounted_where_the_repository_expects_it() -> None:
    path = Path("/moved/repository/abc")
    assert serving_container._inside(path, {"engine": "../../engine/abc"}) == Path("/moved")
    assert serving_container._inside(path, {"checkpoint": "../../checkpoint/abc/unified"}) == Path("/moved")
    assert serving_container._inside(path, {"engine": "/artifacts/engine/abc"}) == Path("/artifacts"), "rendered before"


def test_only_processes_of_this_boot_and_namespace_can_leave_orphans() -> None:
    child = subprocess.Popen(["sleep", "100"])
    place, _, _ = serving_container._owner().rpartition("/")
    started = serving_container._start_time(child.pid)
    label = f"{place}/{child.pid}.{started}"
    assert started.isdigit()
    assert not serving_container._is_orphan(label)
    assert not serving_container._is_orphan(serving_container._owner())
    assert serving_container._is_orphan(f"{place}/{child.pid}.{int(started) - 1}"), "a reused process id"
    child.kill()
    child.wait()
    assert serving_container._is_orphan(label)
    assert serving_container._is_orphan(f"{place}/99999999.1")

    machine, boot, namespace = place.split("/")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert namespace.isdigit()
    elsewhere = [
        f"{machine}/11111111-2222-3333-4444-555555555555/{namespace}",  # another host, or before a restart
        f"other/{boot}/{namespace}",
        f"{machine}/{boot}/{int(namespace) + 1}",
    ]
    for other in elsewhere:
        assert not serving_container._is_orphan(f"{other}/{child.pid}.{started}")


@pytest.mark.parametrize("label", ["", "x", "1.2.3", "99999999.1.4026531836", "////", "a/b/c/1.2", "/1.2"])
def test_labels_of_others_and_of_older_versions_are_left_alone(label: str) -> None:
    assert not serving_container._is_orphan(label)


def test_without_a_boot_id_nothing_is_an_orphan(monkeypatch: pytest.MonkeyPatch) -> None:
    label = serving_container._owner().rpartition("/")[0] + "/99999999.1"
    assert serving_container._is_orphan(label)
    monkeypatch.setattr(serving_container, "_boot_id", lambda: "")
    assert not serving_container._is_orphan(serving_container._place() + "/99999999.1")


@dataclass
class Listed:
    """The part of the SDK's container that remove_orphans uses."""

    labels: dict[str, str]
    removed: bool = False
    status: str = "created"

    def reload(self) -> None:
        if self.removed:
            import docker.errors

            raise docker.errors.NotFound("gone")

    def remove(self, force: bool) -> None:
        self.reload()
        self.removed = True


def test_remove_orphans_removes_only_ours() -> None:
    pytest.importorskip("docker")
    place, _, _ = serving_container._owner().rpartition("/")
    machine, _, namespace = place.split("/")
    ours = Listed({serving_container.OWNER: f"{place}/99999999.1"})
    alive = Listed({serving_container.OWNER: serving_container._owner()})
    other = Listed({serving_container.OWNER: f"{machine}/11111111-2222-3333-4444-555555555555/{namespace}/99999999.1"})
    strange = Listed({serving_container.OWNER: "nonsense"})
    everything = [ours, alive, other, strange]
    client = SimpleNamespace(containers=SimpleNamespace(list=lambda **_: everything))
    serving_container.remove_orphans(client)
    assert [container.removed for container in everything] == [True, False, False, False]
