"""Fixtures for the tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny_runs import write_workplace

from depthsearch.config import load_config
from depthsearch.run.session import Session


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama checkpoint, a text and a run file."""
    folder = tmp_path_factory.mktemp("workplace")
    write_workplace(folder)
    return folder


@pytest.fixture(scope="session")
def session(workplace: Path) -> Session:
    """The workplace's run file, loaded; nothing in it changes."""
    return Session.open(load_config(workplace / "run.yaml"))
