"""Prints what pyproject.toml asks for and this Python lacks, one requirement a line; `make` installs just that.

Arguments: the names to look at first (torch), or nothing for all. A package that is there but too old is an error: the
caller's Python is not changed under its feet.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

from pip._vendor.packaging.requirements import Requirement


def main(names: list[str]) -> int:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"]]
    # An extension is compiled against the torch that is there, so these must be there before the package is installed.
    wanted = [*project["build-system"]["requires"], *wanted]
    for text in wanted:
        requirement = Requirement(text)
        if names and requirement.name not in names:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            print(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            print(
                f"{sys.executable} has {requirement.name} {version}, but resens_fast needs {text}; upgrade it there or "
                "choose another Python with make PYTHON=...",
                file=sys.stderr,
            )
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
