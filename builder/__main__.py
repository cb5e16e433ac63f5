"""The `builder` command. `python -m builder` is the same."""

import signal
import sys


def main() -> int:
    """The exit code of the command line; 130 for an interrupt that came before the command could handle it."""
    try:  # importing the command line takes a while, and Ctrl-C may come in that time
        from builder.cli.main import main as command_line

        code = command_line()
        _let_signals_end_us()
        return code
    except BaseException as error:
        _let_signals_end_us()
        if not _from_interrupt(error):
            raise
        print("interrupted", file=sys.stderr)
        return 130


def _let_signals_end_us() -> None:
    """A signal while Python exits ends it without the traceback of an exception that nobody expects any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _from_interrupt(error: BaseException | None) -> bool:
    """Whether the error is an interrupt, or was made of one: Python 3.11 wraps any exception in `__set_name__`."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


if __name__ == "__main__":
    sys.exit(main())
