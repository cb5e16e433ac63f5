"""The `builder` command. `python -m builder` is the same."""

import sys


def main() -> int:
    """The exit code of the command line; 130 for an interrupt that came before the command could handle it."""
    try:  # importing the command line takes a while, and Ctrl-C may come in that time
        from builder.cli.main import main as command_line

        return command_line()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
