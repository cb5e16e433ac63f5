"""How much memory a script needs, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# VmHWM, not getrusage(2), which counts the memory of the process that started this one, too (fs/exec.c,
# setmax_mm_hiwater_rss).
BEGIN = """
import re, sys
from pathlib import Path
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
END = "\nprint(before, peak())\n"


def growth(script: str, *arguments: str | Path) -> int:
    """Bytes by which the most memory that a process ever had grew between the script's `before = peak()` and its end.

    The script can use sys, Path and its arguments."""
    command = [sys.executable, "-c", BEGIN + script + END, *map(str, arguments)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    before, peak = map(int, ran.stdout.split()[-2:])
    return peak - before
