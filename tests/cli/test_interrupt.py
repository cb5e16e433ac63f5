"""Ctrl-C while `builder` is still importing: no traceback, exit code 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# Raises KeyboardInterrupt when the module argv[1] is imported, as Ctrl-C at that moment would.
INTERRUPTED_IMPORT = """
import sys
from builder.__main__ import main

class Interrupt:
    module = sys.argv[1]

    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            if how == "plain":
                raise KeyboardInterrupt
            # As Python 3.11 does while a class is built.
            raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

sys.meta_path.insert(0, Interrupt())
how, sys.argv[1:] = sys.argv[2], ["gpus"]
sys.exit(main())
"""


@pytest.mark.parametrize("how", ["plain", "wrapped"])
@pytest.mark.parametrize("module", ["builder.cli.main", "argparse", "builder.cli.options"])
def test_an_interrupt_during_imports_is_quiet(module: str, how: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT, module, how], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("interrupted")
    assert len(done.stderr.splitlines()) == 1


def test_a_signal_while_the_command_line_is_parsed_is_an_interrupt() -> None:
    code = """
import os, signal, sys
from builder.__main__ import main
from builder.cli import main as command_line
command_line.parser = lambda: os.kill(os.getpid(), signal.SIGHUP) or os.read(os.pipe()[0], 1)
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_command_ends_python_without_a_traceback(number: int) -> None:
    code = """
import os, sys
from builder.__main__ import main
sys.argv[1:] = ["gpus"]
main()
os.kill(os.getpid(), %d)
"""
    done = subprocess.run([sys.executable, "-c", code % number], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-number, "")


def test_both_entry_points_are_the_same() -> None:
    """The console script that pip installs calls the function that handles an early interrupt."""
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    assert declared == {"builder": "builder.__main__:main"}
