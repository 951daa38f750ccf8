"""Masks judged by what they write, on a real Ray cluster of one and of two workers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tests.tiny_runs import WORDS, workplace_config, write_workplace

from depthsearch.config import RunConfig
from depthsearch.journal import read_journal, without_times
from depthsearch.run.directory import BEST, JOURNAL
from depthsearch.run.search import search
from depthsearch.run.session import Session

pytestmark = pytest.mark.timeout(600)

TARGETS = {"column": "source", "target_column": "target", "text": "pairs.jsonl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_workplace(folder)
    rng = random.Random(0)
    rows = [
        {"source": " ".join(rng.choices(WORDS, k=4)), "target": " ".join(rng.choices(WORDS, k=4))}
        for _ in range(100)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def config_of(folder: Path, pairs: bool, workers: int) -> RunConfig:
    cluster = {"backend": "ray", "workers": workers, "num_cpus": 0.2, "threads": 1}
    return workplace_config(
        folder,
        objective={"kind": "chrf", "max_new_tokens": 6},
        calibration=TARGETS if pairs else {},
        search={"method": "evolution", "max_evaluations": 24, "finalists": 2},
        cluster=(cluster | {"weights": "store"} if pairs else cluster) if workers else {},
    )


@pytest.mark.parametrize("pairs", [False, True])
def test_journal_and_result_are_those_of_one_process(
    folder: Path, tmp_path: Path, pairs: bool
) -> None:
    """Losses, what was written and counted, and races: all are in the journal."""
    found = []
    for workers in (0, 1, 2):
        session = Session.open(config_of(folder, pairs, workers))
        try:
            out = tmp_path / str(workers)
            search(session.config, out, session=session)
            found.append((without_times(read_journal(out / JOURNAL)), (out / BEST).read_bytes()))
            if workers == 2:
                assert session.workers.cluster is not None
                state = session.workers.cluster.dispatcher.state()
                assert state["units_done"] > 0
                assert not state["quarantined"]
        finally:
            session.close()
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_texts_of_workers_are_told_apart_by_what_is_asked(folder: Path, tmp_path: Path) -> None:
    """The same windows with longer answers are another text to a worker that has the first."""
    session = Session.open(config_of(folder, False, 1))
    try:
        for tokens in (2, 6):
            objective = session.config.objective.model_copy(update={"max_new_tokens": tokens})
            changed = session.config.model_copy(update={"objective": objective})
            at = replace(session, config=changed)
            masks = [at.space.dense, *at.space.removals(at.space.dense)][:4]
            windows = at.splits(0).select
            found = at.backend(windows, 0).run(0, masks)
            local = changed.model_copy(
                update={"cluster": changed.cluster.model_copy(update={"backend": "in-process"})}
            )
            assert found == replace(
                replace(at, config=local).backend(windows, 0).run(0, masks), costs=()
            )
    finally:
        session.close()
