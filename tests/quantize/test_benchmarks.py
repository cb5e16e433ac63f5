"""What the benchmarks measure is the command's, not the benchmark's own; and they end where bytes differ."""

from __future__ import annotations

import os
import shutil
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub

from builder.core.safetensors_io import NewTensor, Tensors, write

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HELD = 200_000_000
HOLD = f"held = bytearray(b'x') * {HELD}; "


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_peak_memory_is_that_of_the_command() -> None:
    from process_tree import run

    held = bytearray(b"x") * HELD
    little = run([sys.executable, "-c", "pass"]).resident
    much = run([sys.executable, "-c", f"bytearray(b'x') * {2 * HELD}"]).resident
    assert little < len(held) < 2 * HELD < much
    with pytest.raises(SystemExit, match="failed with 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"])


def test_memory_of_all_processes_adds_up_and_mapped_files_are_not_anonymous(tmp_path: Path) -> None:
    from process_tree import run

    waiting = f"{HOLD} import time; time.sleep(1)"
    both = run(
        [sys.executable, "-c", f"import subprocess, sys; {HOLD} subprocess.run([sys.executable, '-c', {waiting!r}])"]
    )
    assert 2 * HELD < both.anonymous <= both.resident
    (tmp_path / "file").write_bytes(bytes(HELD))
    read = "import mmap; f = open('file'); m = mmap.mmap(f.fileno(), 0, access=1); sum(m[::4096])"
    mapped = run(
        [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {read}; import time; time.sleep(0.5)"]
    )
    assert mapped.anonymous < HELD < mapped.resident


def test_a_kill_reaches_every_process(tmp_path: Path) -> None:
    from process_tree import run_until

    (tmp_path / "child.py").write_text(
        "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    argv = [
        sys.executable,
        "-c",
        f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.run([sys.executable, 'child.py'])",
    ]
    written = tmp_path / "pid"
    run_until(argv, lambda: written.exists() and bool(written.read_text()))
    deadline = time.monotonic() + 30
    while Path(f"/proc/{written.read_text()}").exists():  # until its parent, init, has waited for it
        state = Path(f"/proc/{written.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(SystemExit, match="ended before it was killed"):
        run_until([sys.executable, "-c", "pass"], lambda: False)


def test_a_random_model_is_complete_and_its_weights_have_different_ranges(tmp_path: Path) -> None:
    import numpy as np
    from random_model import embedding_bytes, layer_bytes, make, shape

    config = shape("qwen3-0.6b", 2) | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
    made = Tensors(make(tmp_path / "model", config, shards=3))
    assert len(made.files) == 3
    total = sum(info.nbytes for info in made.values())
    assert total == 2 * layer_bytes(config) + embedding_bytes(config) + 2 * config["hidden_size"]
    weights = [
        np.frombuffer(made.read(n), np.uint16).astype(np.uint32) << 16 for n in made if n.endswith("proj.weight")
    ]
    values = [np.abs(one.view(np.float32)) for one in weights]
    assert all(one.min() >= 2**-9 and one[1:].max() < 2**-5 < 2**-4 <= one.max() == one[0] < 2**-3 for one in values)
    assert len({float(one.max()) for one in values}) > len(values) / 2


def test_a_difference_ends_the_benchmark(tmp_path: Path) -> None:
    from same_tensors import require_same

    def checkpoint(name: str, **tensors: bytes) -> Path:
        made = tmp_path / name
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        write(
            made / "model.safetensors",
            [NewTensor(n.replace("__", "."), "U8", (len(b),), [b]) for n, b in tensors.items()],
        )
        return made

    theirs = checkpoint("theirs", a__weight=b"abc", b__weight=b"d")
    same = checkpoint("ours", a__weight=b"abc", b__weight=b"d")
    assert require_same(same, theirs) == "2 tensors, 4 bytes: the same as those of ModelOpt"
    more = checkpoint("ours", a__weight=b"abc", b__weight=b"d", a__input_scale=b"e")
    assert require_same(more, theirs, ranges=True)
    with pytest.raises(SystemExit, match=r"1 tensors are in only one of .*: a\.input_scale"):
        require_same(more, theirs)
    with pytest.raises(SystemExit, match=r"1 tensors are in only one of .*: b\.weight"):
        require_same(checkpoint("ours", a__weight=b"abc"), theirs, ranges=True)
    with pytest.raises(SystemExit, match=r"1 tensors of .* differ: a\.weight"):
        require_same(checkpoint("ours", a__weight=b"abd", b__weight=b"d"), theirs)
    with pytest.raises(SystemExit, match=r"differ: b\.weight"):
        require_same(checkpoint("ours", a__weight=b"abc", b__weight=b"dd"), theirs)


def test_ratios_are_of_the_same_round_and_goals_have_a_direction() -> None:
    from comparison import fastest, figure, ratios
    from process_tree import Cost

    def costs(*seconds: float) -> list[Cost]:
        return [Cost(one, one, 1, 1) for one in seconds]

    runs = {"a": costs(1.0, 8.0), "b": costs(2.0, 4.0), "ours": costs(0.5, 1.0)}
    assert ratios(fastest(runs, ["a", "b"]), runs["ours"]) == [2.0, 4.0]
    assert figure("faster", [2.0, 4.0], 3.0, at_least=True).met
    assert not figure("longer", [2.0, 4.0], 2.9).met
    assert "3 (2 to 4)" in str(figure("faster", [2.0, 4.0], 3.0, at_least=True))


def test_a_way_that_ran_in_other_rounds_is_shown_without_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    """As the run of a model with half of the layers, which is not repeated (calibrated.py)."""
    from comparison import Result, show
    from process_tree import Cost

    one = Cost(2.0, 2.0, 1, 1)
    show(Result("title", {"base": [one] * 3, "other": [one] * 3, "once": [one]}), "base")
    base, other, once = capsys.readouterr().out.splitlines()[-3:]
    assert base.endswith(" 1.00")
    assert other.endswith(" 1.00")
    assert once.split() == ["once", "2.00", "(2.00", "to", "2.00)", "2.00", "0", "0"]


def test_peers_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import comparison

    def start(*argv: str) -> Any:
        with comparison.started(comparison.parser("").parse_args(argv)) as asked:
            return asked

    monkeypatch.setattr(comparison, "PEERS", {"modelopt": tmp_path})
    with pytest.raises(SystemExit, match="make bench-peers"):
        start("--peers", "modelopt")
    with pytest.raises(SystemExit, match="other is no peer; there are modelopt"):
        start("--peers", "other")
    assert start("--peers", "none").peers == ()
    (tmp_path / "ready").touch()
    assert start("--peers", "modelopt", "--directory", str(tmp_path)).work.parent == tmp_path


def test_half_of_the_layers_are_calibrated_when_the_store_has_their_results(tmp_path: Path) -> None:
    """The names of partial results are those of builder/quantize/streamed.py."""
    from resume import calibrated

    reached = calibrated(tmp_path, 2)
    assert not reached()
    (tmp_path / "partial").mkdir()
    lines = tmp_path / "partial" / "checkpoint-0.jsonl"
    lines.write_text("{}\n{}\n")
    assert not reached()
    lines.write_text("{}\n{}\n{}\n")
    assert reached()


def test_a_server_with_a_rate_sends_the_same_bytes_no_faster(tmp_path: Path) -> None:
    content = os.urandom(400_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    with Hub(rate=1e6) as hub:
        hub.add("org/name", tmp_path)
        url = f"{hub.endpoint}/org/name/resolve/main/model.safetensors"
        start = time.monotonic()
        with urllib.request.urlopen(url) as answer:
            assert answer.read() == content
        assert time.monotonic() - start >= 0.35
        ranged = urllib.request.Request(url, headers={"Range": "bytes=10-19"})
        with urllib.request.urlopen(ranged) as answer:
            assert (answer.status, answer.read()) == (206, content[10:20])
