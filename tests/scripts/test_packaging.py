from __future__ import annotations

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import depthsearch

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): pin
    for name, pin in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
}
REQUIREMENTS = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_the_version_is_written_twice_and_equal() -> None:
    assert depthsearch.__version__ == PROJECT["version"] == version("depthsearch")


def test_scripts_can_be_run_as_they_are() -> None:
    files = [file for file in (ROOT / "scripts").iterdir() if file.is_file()]
    cluster = [*(ROOT / "scripts/cluster").glob("*.s*")]
    scripts = [*(file for file in files if not file.suffix), *cluster, ROOT / ".ci" / "run"]
    assert scripts
    for script in scripts:
        assert os.access(script, os.X_OK), script
        assert script.read_text().startswith("#!/usr/bin/env "), script
