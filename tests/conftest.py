"""Settings of every test: one thread, no deadlines for examples, the longest files first."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from tests.commands import Cli, Result
from tests.tiny_runs import write_workplace

from depthsearch.cli import main

torch.set_num_threads(1)

# How long an example takes says nothing on a busy machine.
settings.register_profile("depthsearch", deadline=None)
settings.load_profile("depthsearch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that parallel workers end together.

    They are those with tests that run the real model or have a time limit of their own, each of
    which takes about as long as a hundred others.
    """
    long = Counter(
        item.path
        for item in items
        if item.get_closest_marker("slow") or item.get_closest_marker("timeout")
    )
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: -long[item.path] - tests[item.path] // 100)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny llama checkpoint, a text and a run file."""
    folder = tmp_path_factory.mktemp("workplace")
    write_workplace(folder)
    return folder


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["depthsearch", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capfd.readouterr()
        return Result(code, printed.out, printed.err)

    return run
