from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import workplace_config

from depthsearch.config import SearchConfig
from depthsearch.errors import (
    ConfigError,
    DepthsearchError,
    InputError,
    JournalError,
    RunDirectoryError,
)
from depthsearch.evaluation.feeding import Ask, Efficiency, Fed, workers_fed
from depthsearch.journal import Record, read_journal
from depthsearch.run.directory import ARMS, CONFIG, JOURNAL
from depthsearch.run.feeding import (
    MOST_WORKERS,
    Asked,
    feeding,
    hardly_faster,
    parse_counts,
    read_asked,
    thinned,
    verdict,
)
from depthsearch.run.search import search
from depthsearch.space import Mask

SEQUENCES, ROWS = 16, 4  # of tests.tiny_runs: 256 tokens, windows of 16, batches of 64


def searched(workplace: Path, out: Path, **changes: Any) -> Path:
    search(workplace_config(workplace, **changes), out)
    return out


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of which a race ended some masks."""
    return searched(workplace, tmp_path_factory.mktemp("fed") / "run")


@pytest.fixture(scope="module")
def records(finished: Path) -> list[Record]:
    return read_journal(finished / JOURNAL)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def rewrite(run: Path, *changes: tuple[str, str]) -> None:
    """Exchange parts of config.yaml, each of which must be there."""
    text = (run / CONFIG).read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (run / CONFIG).write_text(text)


def cut(run: Path, op: str) -> None:
    """Leave the journal up to its first record `op`, and half of the next."""
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if json.loads(line)["op"] == op) + 1
    (run / JOURNAL).write_bytes(b"".join(lines[:place]) + lines[place][:20])


class TestReading:
    def test_asks_are_those_of_the_journal_with_the_batches_of_each_mask(
        self, finished: Path, records: list[Record]
    ) -> None:
        asked = read_asked(finished)
        tells = [record["evaluations"] for record in records if record["op"] == "tell"]
        asks = [record for record in records if record["op"] == "ask"]
        assert asked.batches == SEQUENCES // ROWS
        assert asked.finished
        assert [[m.key for m in ask.masks] for ask in asked.asks] == [
            [e["mask"] for e in told] for told in tells
        ]
        lost = 0
        for ask, record, told in zip(asked.asks, asks, tells, strict=True):
            if record["survivors"] is None:
                assert ask.lasts is None
                continue
            assert ask.lasts == tuple(math.ceil(len(e["losses"]) / ROWS) for e in told)
            lost += sum(last < asked.batches for last in ask.lasts)
            assert len(ask.on(asked.batches - 1)) == sum(e["status"] == "ok" for e in told)
        assert lost > 0
        assert asked.raced
        assert asked.masks == sum(len(told) for told in tells)

    def test_a_search_without_races_judges_all_on_everything(
        self, workplace: Path, tmp_path: Path
    ) -> None:
        run = searched(workplace, tmp_path / "run", search={"max_evaluations": 20, "racing": False})
        asked = read_asked(run)
        assert {ask.lasts for ask in asked.asks} == {None}
        assert not asked.raced
        assert not any("racing" in setting for setting in asked.for_more)

    @pytest.mark.parametrize(
        ("repair", "batches"), [("gap", 1), ("sequential", 1), ("table", SEQUENCES // ROWS)]
    )
    def test_repair_for_each_mask_leaves_one_unit(
        self, workplace: Path, tmp_path: Path, repair: str, batches: int
    ) -> None:
        run = searched(
            workplace,
            tmp_path / "run",
            calibration={"fit_tokens": 128, "finals_fit_tokens": 128},
            space={"granularity": "block", "budget": {"drop_blocks": 1}},
            search={"max_evaluations": 8, "finalists": 2, "repair": repair},
        )
        asked = read_asked(run)
        assert asked.batches == batches
        assert asked.raced == (repair == "table")
        assert ("search.repair=table" in asked.for_more) == (batches == 1)
        notes = feeding(run, (1, 2))["notes"]
        assert any("fits of gaps" in note for note in notes) == (repair == "table")

    def test_an_unfinished_search_counts_as_far_as_it_went(
        self, finished: Path, copy: Path
    ) -> None:
        cut(copy, "tell")
        asked = read_asked(copy)
        assert asked.asks == read_asked(finished).asks[:1]
        assert not asked.finished
        assert any("not finished" in note for note in feeding(copy, (1,))["notes"])

    def test_it_needs_neither_the_model_nor_the_text(self, finished: Path, copy: Path) -> None:
        folder = str(finished.parents[1])
        text = (copy / CONFIG).read_text()
        (copy / CONFIG).write_text(text.replace(folder, "/elsewhere"))
        assert read_asked(copy) == read_asked(finished)


def no_journal(run: Path) -> None:
    (run / JOURNAL).unlink()


def no_config(run: Path) -> None:
    (run / CONFIG).unlink()


def comparison(run: Path) -> None:
    (run / JOURNAL).unlink()
    (run / ARMS).mkdir()


def damaged(run: Path) -> None:
    lines = (run / JOURNAL).read_text().splitlines(keepends=True)
    (run / JOURNAL).write_text("".join([lines[0], "not JSON\n", *lines[1:]]))


def without_losses(run: Path) -> None:
    text = (run / JOURNAL).read_text()
    (run / JOURNAL).write_text(text.replace('"losses"', '"loses"'))


def wrong_mask(run: Path) -> None:
    text = (run / JOURNAL).read_text()
    (run / JOURNAL).write_text(text.replace('"mask":"1', '"mask":"2'))


REFUSED: dict[str, tuple[Any, type[DepthsearchError], str]] = {
    "no journal": (no_journal, RunDirectoryError, "has no journal.jsonl"),
    "no config": (no_config, RunDirectoryError, "has no config.yaml"),
    "a comparison": (comparison, RunDirectoryError, "one of the folders in arms/"),
    "damaged journal": (damaged, JournalError, "line 2 is no record of a journal"),
    "other version": (without_losses, JournalError, "another version"),
    "broken mask": (wrong_mask, JournalError, "not a mask key"),
    "empty journal": (lambda run: (run / JOURNAL).write_text(""), JournalError, "no evaluations"),
    "asked only": (lambda run: cut(run, "ask"), JournalError, "depthsearch resume"),
    "less text": (
        lambda run: rewrite(run, ("select_tokens: 256", "select_tokens: 128")),
        JournalError,
        "does not fit config.yaml",
    ),
    "more text": (
        lambda run: rewrite(run, ("select_tokens: 256", "select_tokens: 512")),
        JournalError,
        "16 of 32 sequences",
    ),
    "broken config": (
        lambda run: rewrite(run, ("select_tokens: 256", "select_tokens: no")),
        ConfigError,
        "select_tokens",
    ),
    "streamed": (
        lambda run: rewrite(run, ("streamed: false", "streamed: true")),
        InputError,
        "model.streamed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused_in_one_line(copy: Path, case: str) -> None:
    damage, kind, message = REFUSED[case]
    damage(copy)
    with pytest.raises(kind) as caught:
        feeding(copy, (1,))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class TestFigures:
    def test_they_are_those_of_the_simulation(self, finished: Path) -> None:
        seen: list[tuple[int, int]] = []
        found = feeding(finished, (1, 4, 16), lambda *place: seen.append(place))
        asked = read_asked(finished)
        fed = workers_fed(asked.asks, asked.batches, (1, 4, 16))
        assert found["fed"] == {"busy": fed.busy, "total": fed.total}
        assert [
            (row["workers"], row["busy"], row["sharing"], row["total"]) for row in found["workers"]
        ] == [(e.workers, e.busy, e.sharing, e.total) for e in fed.tried]
        assert found["workers"][0]["speed_up"] == pytest.approx(1)
        assert found["workers"][1]["speed_up"] == 4 * fed.tried[1].total > 1
        total = 3 * len(asked.asks)
        assert seen == [(place, total) for place in range(1, total + 1)]
        assert found["simulated_asks"] == found["asks"] == len(asked.asks)
        assert found["notes"] == []
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_more_workers_than_masks_and_batches_are_not_fed(self, finished: Path) -> None:
        found = feeding(finished, (1, 512))
        assert found["fed"]["total"] == 1
        assert found["workers"][1]["busy"] < 0.5
        assert "search.options.offspring" in found["verdict"]
        assert "search.racing=false" in found["verdict"]


def asked_for(asks: int, masks: int, batches: int) -> Asked:
    found = tuple(
        Ask(tuple(Mask.dropping(40, [ask % 40, 1 + mask]) for mask in range(masks)))
        for ask in range(asks)
    )
    return Asked(found, batches, True, SearchConfig())


class TestThinning:
    def test_few_are_kept_all(self) -> None:
        asked = asked_for(10, 4, 5)
        assert thinned(asked, 200) == asked.asks

    def test_of_many_evenly_chosen_ones_stay(self) -> None:
        asked = asked_for(10, 4, 5)
        assert thinned(asked, 100) == asked.asks[1::2]
        assert sum(len(ask.masks) for ask in thinned(asked, 199)) * 5 <= 199

    def test_one_stays_of_whatever_there_is(self) -> None:
        asked = asked_for(3, 4, 5)
        assert thinned(asked, 1) == asked.asks[1:2]

    def test_it_is_said(self, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("depthsearch.run.feeding.thinned", lambda asked: asked.asks[:1])
        found = feeding(finished, (1, 2))
        assert found["simulated_asks"] == 1 < found["asks"]
        assert found["notes"] == [f"Simulated with 1 of {found['asks']} asks, evenly chosen."]


def fed(busy: int, total: int, **totals: float) -> Fed:
    tried = tuple(Efficiency(int(n[1:]), 1.0, share) for n, share in totals.items())
    return Fed(busy, total, tried)


class TestWords:
    def test_what_is_fed_and_what_would_feed_more(self) -> None:
        found = fed(4, 8, w1=1.0, w4=0.96, w8=0.9, w64=0.11)
        assert hardly_faster(found).workers == 8
        assert verdict(found, ["this", "that"]) == (
            "This search feeds up to 8 workers with 80 % of the ideal speed-up, and keeps up to 4 "
            "workers busy 95 % of the time. More than 8 workers make it hardly faster: 7.2 times "
            "one. For more: this; that."
        )

    def test_all_that_were_tried(self) -> None:
        assert verdict(fed(8, 8, w1=1.0, w8=0.99), ["this"]) == (
            "This search feeds 8 workers, the most tried, with 80 % of the ideal speed-up, and "
            "keeps 8 workers, the most tried, busy 95 % of the time."
        )

    def test_none(self) -> None:
        said = verdict(fed(0, 0, w2=0.6), ["this"])
        assert "feeds fewer than 2 workers" in said
        assert said.endswith("For more: this.")
        assert "no more than 1 worker " in verdict(fed(1, 1, w1=1.0, w2=0.6), ["this"])

    @pytest.mark.parametrize(
        ("method", "batch", "first"),
        [
            ("evolution", None, "a larger search.options.offspring"),
            ("random", None, "a larger search.options.batch"),
            ("optuna", 4, "a larger search.batch"),
            ("greedy", 4, "no search.batch"),
            ("greedy", None, "more batches"),
        ],
    )
    def test_what_widens_an_ask_depends_on_the_method(
        self, method: str, batch: int | None, first: str
    ) -> None:
        asked = Asked((), 4, True, SearchConfig(method=method, batch=batch))
        assert asked.for_more[0].startswith(first)


class TestCounts:
    def test_they_are_sorted_and_each_tried_once(self) -> None:
        assert parse_counts("8, 1,8,64") == (1, 8, 64)

    @pytest.mark.parametrize("text", ["", "0", "1,-2", "many", "1,,2", f"1,{MOST_WORKERS + 1}"])
    def test_others_are_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="--workers is"):
            parse_counts(text)
