"""Holds an image's Python packages where they are while ours is installed. Run inside the image that is being built.

save FILE                      the installed versions, as constraints for pip
compare FILE                   fails if one of those has another version now, or is gone
requirements FILE EXTRA...     what a pyproject.toml asks for
expect NAME VERSION            fails if NAME is not installed in VERSION ("none": if it is installed at all)
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path


def installed() -> dict[str, str]:
    """Version by name. `pip freeze` would give paths for wheels that were installed from files, as NVIDIA's are."""
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}


def save(file: Path) -> None:
    """Distribution packages (Debian's) have versions that pip can't read; `compare` watches those all the same."""
    from pip._vendor.packaging.version import InvalidVersion, Version

    lines = []
    for name, version in sorted(installed().items()):
        try:
            Version(version)
            lines.append(f"{name}=={version}")
        except InvalidVersion:
            lines.append(f"# {name}=={version}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(file: Path) -> None:
    before = dict(line.removeprefix("# ").split("==", 1) for line in file.read_text(encoding="utf-8").splitlines())
    after = installed()
    moved = [f"{n}: {v} -> {after.get(n, 'removed')}" for n, v in before.items() if after.get(n) != v]
    if moved:
        sys.exit("pip changed what the base image ships:\n" + "\n".join(moved))
    added = sorted(set(after) - set(before))
    print(f"{len(before)} packages as the base image ships them, {len(added)} added: {', '.join(added)}")


def requirements(file: Path, *extras: str) -> None:
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    wanted = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    print("\n".join(line for lines in wanted for line in lines))


def expect(name: str, version: str) -> None:
    found = installed().get(name.replace("_", "-"), "none")
    if found != version:
        sys.exit(
            f"The base image has {name} {found}, and {version} was said.\n"
            f"Build with --build-arg BASE_IMAGE=... of another tag, or --build-arg TENSORRT_LLM={found}"
        )


if __name__ == "__main__":
    command, first, *rest = sys.argv[1:]
    if command == "expect":
        expect(first, *rest)
    elif command == "requirements":
        requirements(Path(first), *rest)
    else:
        {"save": save, "compare": compare}[command](Path(first))
