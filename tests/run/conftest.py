"""Fixtures for the tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from depthsearch.config import load_config
from depthsearch.run.session import Session


@pytest.fixture(scope="session")
def session(workplace: Path) -> Session:
    """The workplace's run file, loaded; nothing in it changes."""
    return Session.open(load_config(workplace / "run.yaml"))
