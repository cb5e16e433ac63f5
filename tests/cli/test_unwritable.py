"""An output directory that is read-only, not ours or out of inodes: a message and exit code, never a traceback."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import report_store

MODEL = "tests/data/tiny-qwen3"
BUILDER = shlex.join([sys.executable, "-m", "builder"])
# Another user, who can read this checkout and its Python wherever they are.
NOBODY = "setpriv --reuid 65534 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search"
MODES = {
    "read-only": ('mount --bind "$OUT" "$OUT"; mount -o remount,bind,ro "$OUT"', ""),
    "another owner's": ("", NOBODY),
    "without inodes": (
        'cp -a "$OUT" "$OUT.copy"; mount -t tmpfs -o nr_inodes=300 tmpfs "$OUT"; cp -a "$OUT.copy"/. "$OUT"; '
        'i=0; while mkdir "$OUT/fill.$i" 2>/dev/null; do i=$((i+1)); done',
        "",
    ),
}
FULL, OURS = (1, "no free inodes"), (2, "Can't write to")
COMMANDS = {
    "fetch --model tests/data/arch-variants/qwen2 --gpu cpu --output $OUT": True,
    f"fetch --model {MODEL} --gpu cpu --output $OUT --force fetch": True,
    f"render --model {MODEL} --gpu cpu --output $OUT": True,
    "report $OUT/models/m": True,
    f"plan --model {MODEL} --gpu cpu --output $OUT": False,
    "verify --output $OUT": None,
    "clean --output $OUT": None,  # needs no new file if the lock files exist
}


def can_mount() -> bool:
    return os.getuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="mounts need root and a mount namespace of their own")
@pytest.mark.parametrize("mode", MODES)
def test_an_output_that_is_not_writable(mode: str, tmp_path: Path) -> None:
    """`True`: the command must fail and say why. `False`: it must succeed. `None`: it may fail, with a message."""
    store = tmp_path / "store"
    report_store.build(store, link="m")
    fetched = subprocess.run(
        [sys.executable, "-m", "builder", "fetch", "--model", MODEL, "--gpu", "cpu", "--output", str(store)],
        capture_output=True,
    )
    assert fetched.returncode == 0
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.getuid() and not directory.stat().st_mode & 0o001:
            directory.chmod(0o755)
    mount, user = MODES[mode]
    script = [mount]
    for command in COMMANDS:
        script.append(f"{user} {BUILDER} {command} > {tmp_path}/said 2>&1; code=$?")
        script.append(f'echo "==$code"; cat {tmp_path}/said')
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", "\n".join(script)],
        capture_output=True, text=True, env={**os.environ, "OUT": str(store)},
    )  # fmt: skip
    answers = done.stdout.split("==")[1:]
    assert len(answers) == len(COMMANDS), done.stderr
    for (command, must), answer in zip(COMMANDS.items(), answers, strict=True):
        code, _, said = answer.partition("\n")
        assert "Traceback" not in said, (command, said)
        if must:
            expected, why = FULL if mode == "without inodes" else OURS
            assert (int(code), why in said) == (expected, True), (command, said)
        else:
            assert int(code) in ((0,) if must is False else (0, 1, 2, 3, 6)), (command, said)
            assert int(code) in (0, 3) or "error: " in said, (command, said)
    assert not list(store.rglob("*.tmp"))


@pytest.mark.skipif(not can_mount(), reason="another user is needed, and root to become one")
def test_a_file_that_is_not_readable(tmp_path: Path) -> None:
    """The message says "can't read", not "can't write"."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gpu: cpu")
    recipe.chmod(0)
    for directory in (tmp_path, *tmp_path.parents[:3]):  # with xdist one more
        directory.chmod(0o755)
    become = "import os, sys; from builder import pipeline, plan; from builder.cli import main; os.setuid(65534); "
    for call in (
        f"sys.exit(main.main(['plan', '--recipe', {str(recipe)!r}]))",
        f"sys.exit(main._from_os_error(PermissionError(13, 'no', {str(recipe)!r}), None).what)",
    ):
        done = subprocess.run([sys.executable, "-c", become + call], capture_output=True, text=True)
        assert done.returncode in (1, 2)
        assert "Can't read" in done.stderr
        assert "Traceback" not in done.stderr
