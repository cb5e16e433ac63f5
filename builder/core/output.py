"""Everything that commands print: data on stdout, messages on stderr. All of it passes through `safe_text`.

There are three modes. `human` prints for people: with colours and bars on a terminal, as plain lines elsewhere. `json`
prints one object on stdout: the result, and the error if the command fails. `quiet` prints nothing but errors.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from builder.core.safe_text import printable_line, redact, safe

if TYPE_CHECKING:
    from builder.core.errors import BuilderError

Mode = Literal["human", "json", "quiet"]

# Without a terminal, progress is printed at most this often: somebody reads the log file later.
PLAIN_PROGRESS_SECONDS = 5.0


BYTES = "B"  # the unit of progress that is printed as sizes


class Progress:
    """A progress bar on a terminal; elsewhere a line every few seconds. `update` is cheap enough to call per item."""

    def __init__(self, output: Output, label: str, total: float | None, unit: str) -> None:
        self._output, self._label, self._total, self._unit = output, label, total, unit
        self._start = self._printed = time.monotonic()
        self._bar: Any = None
        if output.live:
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("  {task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[count]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=output.console,
                transient=True,
            )
            self._task = self._bar.add_task(printable_line(label), total=total, count="")
            self._bar.start()

    def update(self, done: float, total: float | None = None, label: str | None = None) -> None:
        """Shows that `done` of `total` items are complete. 0 restarts the clock that the time left is estimated from.

        `total` and `label` replace those given before; None keeps them.
        """
        self._total = total or self._total
        self._label = label or self._label
        count = _count(done, self._total, self._unit) if self._total else ""
        if self._bar is not None:
            shown = printable_line(self._label)
            self._bar.update(self._task, completed=done, total=self._total, description=shown, count=count)
            return
        now = time.monotonic()
        if not done:
            self._start = now
        if self._output.mode == "human" and now - self._printed >= PLAIN_PROGRESS_SECONDS:
            self._printed = now
            left = ""
            if self._total and done:
                left = f", about {seconds((now - self._start) * (self._total - done) / done)} left"
            self._output.info(f"{self._label}: {count}{left}" if count else self._label)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()


class Output:
    """Where every stage prints: data on stdout, messages on stderr, and with --json one object at the end."""

    def __init__(self, mode: Mode = "human") -> None:
        self.mode = mode
        self.live = mode == "human" and sys.stderr.isatty()
        self._console: Any = None
        self._result: dict[str, Any] | None = None
        self._printed = False  # the JSON object
        self._wrote = False  # anything else on stdout

    @property
    def console(self) -> Any:
        """The rich console on stderr, created on first use so that `--help` does not import rich."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
        return self._console

    def _message(self, text: str, style: str = "") -> None:
        if self.mode == "quiet":
            return
        text = safe(text)
        if self.live:
            self.console.print(text, style=style or None, markup=False, emoji=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def stage(self, name: str, text: str) -> None:
        """Prints what happens to a stage: it started, was found in the store, or ended."""
        self._message(f"{name:<11} {text}", "bold" if self.live else "")

    def info(self, text: str) -> None:
        """Prints a message."""
        self._message(f"{'':<11} {text}")

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self._message(f"{'warning':<11} {text}", "yellow")

    @contextmanager
    def progress(self, label: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
        """Shows the progress of the work inside the block, with an estimate of the time left.

        `total` counts in `unit`, BYTES of which are printed as sizes; None if it is not known.
        """
        bar = Progress(self, label, total, unit)
        try:
            yield bar
        finally:
            bar.close()

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Prints a table on stdout, in human mode.

        A terminal gets a drawn table. A pipe gets a comment with the title, a line of column names and the rows,
        separated by tabs, so that tables can still be told apart.
        """
        if self.mode != "human":
            return
        cells = [[printable_line(redact(str(cell))) for cell in row] for row in rows]
        if not sys.stdout.isatty():
            header = [printable_line(redact(column)) for column in columns]
            title = printable_line(redact(title))
            print(("\n" if self._wrote else "") + f"# {title}")
            for row in (header, *cells):
                print("\t".join(row))
            self._wrote = True
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(safe(title)), title_justify="left", box=box.SIMPLE)  # Text: no markup
        for column in columns:
            table.add_column(Text(safe(column)), overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)

    def text(self, text: str) -> None:
        """Prints text on stdout, in human mode."""
        if self.mode == "human":
            print(safe(text))
            self._wrote = True

    def result(self, data: dict[str, Any]) -> None:
        """Adds keys to the object that --json prints."""
        self._result = {**(self._result or {}), **data}

    def finish(self) -> None:
        """Prints the object of --json, once: at the end of a command, or earlier for one that keeps running."""
        if self.mode == "json" and self._result is not None and not self._printed:
            self._printed = True
            print(redact(json.dumps(self._result, indent=2, sort_keys=False, default=str)))


def _count(done: float, total: float, unit: str) -> str:
    return f"{size(done)} of {size(total)}" if unit == BYTES else f"{done:,.0f}/{total:,.0f} {unit}"


def print_error(error: BuilderError) -> None:
    """Prints on stderr what happened, why, and what to type next. In every mode."""
    first, *more = safe(error.what).splitlines() or [""]
    print(f"error: {first}", file=sys.stderr)
    for line in (*more, *(line for part in (error.why, error.hint) for line in safe(part).splitlines())):
        print(f"  {line}", file=sys.stderr)


def listed(names: Sequence[str], shown: int = 3) -> str:
    """The first of these names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def size(n: float) -> str:
    """Bytes in decimal units, as disks are sold: 6_400_000_000 -> '6.40 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"


def seconds(s: float) -> str:
    """A duration in seconds, for people: 3725 -> '1h02m', 75 -> '1m15s', 0.412 -> '0.4s'."""
    if s >= 3600:
        return f"{int(s // 3600)}h{int(s % 3600 // 60):02d}m"
    if s >= 60:
        return f"{int(s // 60)}m{int(s % 60):02d}s"
    return f"{s:.1f}s"
