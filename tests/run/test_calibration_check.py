from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny_runs import workplace_config, write_text

from depthsearch.calibration.windows import draw_windows
from depthsearch.errors import JournalError, NothingFoundError, RunDirectoryError
from depthsearch.evaluation import InProcess, evaluate
from depthsearch.journal import read_journal, without_times
from depthsearch.run.calibration_check import check_calibration
from depthsearch.run.calibration_texts import CheckOptions
from depthsearch.run.directory import CALIBRATION, CALIBRATION_JOURNAL, CONFIG
from depthsearch.run.session import Session
from depthsearch.space import Mask

OPTIONS = CheckOptions(masks=8, draws=3, folds=4, lengths=(32,), sizes=(64, 512))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("other") / "other.txt", seed=1))


@pytest.fixture(scope="module")
def finished(
    session: Session, other: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("checked") / "out"
    found = check_calibration(session.config, out, OPTIONS, others=[(other, None)], session=session)
    return out, found


def samples_of(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in found["samples"] if row["kind"] == kind]


def test_losses_of_samples_are_those_of_a_search_on_the_same_text(
    session: Session, finished: tuple[Path, dict[str, Any]]
) -> None:
    """The first sample is the text that the search selects on, judged by the search's backend."""
    _, found = finished
    masks = [Mask.from_key(entry["mask"]) for entry in found["masks"]]
    select, calibration = session.splits(0).select, session.config.calibration
    (drawn,) = draw_windows(
        session.documents,
        session.loaded.tokenizer,
        calibration.window_tokens,
        calibration.select_tokens,
        1,
        calibration.heldout_fraction,
        session.config.search.seed,
    )
    assert sorted(drawn.tolist()) == sorted(select.tolist())
    # The positions that a loss is taken at go by the place of a window.
    evaluations, _ = evaluate(session.backend(drawn, 0), masks)
    first = samples_of(found, "draw")[0]
    assert first["losses"] == pytest.approx([e.loss for e in evaluations])
    assert first["winner"] == int(np.argmin([e.loss for e in evaluations]))
    assert first["tokens"] == select.numel()


def test_held_out_figures_are_those_of_every_position_and_number_the_masks(
    session: Session, finished: tuple[Path, dict[str, Any]]
) -> None:
    _, found = finished
    masks = [Mask.from_key(entry["mask"]) for entry in found["masks"]]
    kl, _ = session.judge(session.splits(0).heldout).figures(masks)
    held = kl.mean(dim=1).tolist()
    assert found["heldout"]["losses"] == pytest.approx(held)
    assert held == sorted(held)
    for row in found["samples"]:
        assert row["heldout_loss"] == pytest.approx(held[row["winner"]])
        assert row["gap"] == pytest.approx(held[row["winner"]] - min(row["losses"]))
        assert row["regret"]["mean"] == pytest.approx(held[row["winner"]] - held[0], abs=1e-9)


def test_every_mask_is_judged_once_on_every_window(
    session: Session, finished: tuple[Path, dict[str, Any]]
) -> None:
    """Sizes and folds are regrouped: the journal holds each batch of each text once, no more."""
    out, found = finished
    records = read_journal(out / CALIBRATION_JOURNAL)
    assert [r["op"] for r in records[:2]] == ["start", "masks"]
    units = [(r["text"], r["batch"]) for r in records[2:]]
    assert len(set(units)) == len(units)
    windows = {text["name"]: text["windows"] for text in found["texts"]}
    for name, count in windows.items():
        rows = [r["losses"] for r in records[2:] if r["text"] == name]
        assert all(len(row) == 8 for row in rows)
        assert sum(len(row[0]) for row in rows) == count
    assert len(samples_of(found, "fold")) == 4
    assert [row["tokens"] for row in found["sizes"]] == [64, 256, 512]
    assert found["sizes"][found["configured"]]["tokens"] == 256
    assert found == json.loads((out / CALIBRATION).read_text())
    dense = 3 * 256 + 2 * 256 + session.splits(0).heldout.numel()
    assert dense < found["cost_tokens"] < 9 * dense


class Interrupting:
    """Interrupts like Ctrl-C before a certain unit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, units: int) -> None:
        self.left = units
        self.run = InProcess.run
        monkeypatch.setattr(InProcess, "run", lambda *args, **named: self(*args, **named))

    def __call__(self, *args: Any, **named: Any) -> Any:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.run(*args, **named)


def test_an_interrupted_check_is_continued_to_the_same_files(
    session: Session,
    finished: tuple[Path, dict[str, Any]],
    other: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def go() -> Any:
        named = {"others": [(other, None)], "session": session}
        return check_calibration(session.config, out, OPTIONS, **named)

    for units in (0, 3, 5):
        with monkeypatch.context() as patch:
            Interrupting(patch, units)
            with pytest.raises(KeyboardInterrupt):
                go()
        assert not (out / CALIBRATION).exists()
    assert go() == finished[1]
    assert (out / CALIBRATION).read_bytes() == (finished[0] / CALIBRATION).read_bytes()
    ours, theirs = (
        without_times(read_journal(folder / CALIBRATION_JOURNAL)) for folder in (out, finished[0])
    )
    assert ours == theirs


def test_an_unfinished_check_with_other_options_or_settings_is_refused(
    session: Session, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = CheckOptions(masks=4, draws=2, lengths=(32,))
    with monkeypatch.context() as patch:
        Interrupting(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            check_calibration(session.config, out, options, session=session)
    before = (out / CALIBRATION_JOURNAL).read_bytes()
    with pytest.raises(JournalError, match=r"options\.masks', 4 before and 5 now"):
        check_calibration(session.config, out, replace(options, masks=5), session=session)
    changed = workplace_config(workplace, search={"seed": 1})
    with pytest.raises(RunDirectoryError, match="unfinished check with another configuration"):
        check_calibration(changed, out, options, session=session)
    assert (out / CALIBRATION_JOURNAL).read_bytes() == before


def test_what_is_there_is_never_overwritten(
    session: Session, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(RunDirectoryError, match="finished check and is never overwritten"):
        check_calibration(session.config, finished[0], OPTIONS, session=session)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="is no calibration check"):
        check_calibration(session.config, tmp_path, OPTIONS, session=session)
    assert sorted(path.name for path in finished[0].iterdir()) == [
        CALIBRATION, CALIBRATION_JOURNAL, CONFIG,
    ]  # fmt: skip


def test_a_space_with_a_single_mask_leaves_nothing_behind(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    protect = ["first", "last", 1, "decoder.2.attention"]
    space = {"protect": protect, "budget": {"drop_sites": 1}}
    config = workplace_config(workplace, space=space)
    with pytest.raises(NothingFoundError, match="holds 1 mask on budget"):
        check_calibration(config, tmp_path / "out", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_that_fails_is_left_out_and_named(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mask overflows on the second sample: it is judged no more, and ranked nowhere."""
    from depthsearch.evaluation.backend import UnitResult
    from depthsearch.space import Status

    run, seen = InProcess.run, []

    def failing(self: InProcess, batch: int, masks: Any, *args: Any, **named: Any) -> UnitResult:
        unit = run(self, batch, masks, *args, **named)
        seen.append(len(masks))
        if len(seen) != 6:
            return unit
        losses, statuses = list(unit.losses), list(unit.statuses)
        losses[2], statuses[2] = (), Status.NON_FINITE
        return UnitResult(tuple(losses), tuple(statuses), unit.cost_tokens)

    monkeypatch.setattr(InProcess, "run", failing)
    options = CheckOptions(masks=6, draws=2, lengths=(32,))
    found = check_calibration(session.config, tmp_path / "out", options, session=session)
    assert seen == [6] * 6 + [5] * (len(seen) - 6)
    records = read_journal(tmp_path / "out" / CALIBRATION_JOURNAL)
    gone = records[1]["proposals"][2]["mask"]
    assert gone not in [entry["mask"] for entry in found["masks"]]
    assert len(found["masks"]) == 5
    assert f"{gone} ({records[1]['proposals'][2]['origin']}) is left out" in found["notes"][0]
