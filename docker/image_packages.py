"""Makes sure that installing our packages changes none of an image's own. Runs inside the image that is being built.

save FILE                      writes the installed versions, as constraints for pip
compare FILE                   fails if one of those was changed or removed
requirements FILE EXTRA...     prints the requirements in a pyproject.toml
expect NAME VERSION            fails unless NAME is installed in VERSION ("none": unless it is not installed)
"""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path


def installed() -> dict[str, str]:
    """{name: version}. `pip freeze` would print paths for wheels that were installed from files, such as NVIDIA's."""
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}


def save(file: Path) -> None:
    """Writes the constraints. pip can't parse some versions of Debian packages; those become comments for `compare`."""
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
    """Exits with a message if a package that `save` recorded has changed; otherwise prints what was added."""
    before = dict(line.removeprefix("# ").split("==", 1) for line in file.read_text(encoding="utf-8").splitlines())
    after = installed()
    moved = [f"{n}: {v} -> {after.get(n, 'removed')}" for n, v in before.items() if after.get(n) != v]
    if moved:
        sys.exit("pip changed what the base image ships:\n" + "\n".join(moved))
    added = sorted(set(after) - set(before))
    print(f"{len(before)} packages of the base image unchanged, {len(added)} added: {', '.join(added)}")


def requirements(file: Path, *extras: str) -> None:
    """Prints the dependencies of a pyproject.toml and of these extras, one per line."""
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    wanted = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    print("\n".join(line for lines in wanted for line in lines))


def expect(name: str, version: str) -> None:
    """Exits with a message unless the distribution is installed in this version."""
    found = installed().get(name.replace("_", "-"), "none")
    if found != version:
        sys.exit(
            f"The base image has {name} {found}, not {version}.\n"
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
