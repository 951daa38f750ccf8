from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import workplace_config

from depthsearch.config import load_config
from depthsearch.errors import (
    ConfigError,
    DataError,
    JournalError,
    ModelError,
    RunDirectoryError,
)
from depthsearch.journal import read_journal, without_times
from depthsearch.run.directory import BEST, CONFIG, JOURNAL
from depthsearch.run.search import resume, run_config, search
from depthsearch.run.session import Session
from depthsearch.searchers import SEARCHERS
from depthsearch.space import Mask


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def journal_of(run: Path) -> str:
    return without_times(read_journal(run / JOURNAL))


@pytest.fixture(scope="module")
def finished(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    search(session.config, out, session=session)
    return out


def test_streamed_weights_write_the_same_journal(
    workplace: Path, finished: Path, tmp_path: Path
) -> None:
    config = workplace_config(workplace, model={"streamed": True, "host_gb": 0.001})
    search(config, tmp_path / "run")
    assert journal_of(tmp_path / "run") == journal_of(finished)
    assert (tmp_path / "run" / BEST).read_bytes() == (finished / BEST).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"streamed": True}, "cluster": {"backend": "ray", "num_gpus": 2}}, "one device"),
        ({"model": {"streamed": True, "device": "cuda:0,cuda:1"}}, "one device"),
        ({"model": {"streamed": True}, "cluster": {"backend": "ray", "weights": "store"}}, "store"),
        ({"model": {"streamed": True, "trust_remote_code": True}}, "own code"),
    ],
)
def test_what_does_not_go_together_is_refused_first(
    workplace: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(workplace_config(workplace, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class StoppedError(Exception):
    """Raised in the middle of a search."""


def copy_of(run: Path, tmp_path: Path, *names: str) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for name in names or (CONFIG, JOURNAL):
        (out / name).write_bytes((run / name).read_bytes())
    return out


@pytest.mark.parametrize("method", list(SEARCHERS))
def test_every_method_finds_a_mask_on_budget(
    session: Session, workplace: Path, tmp_path: Path, method: str
) -> None:
    settings = {"method": method, "max_evaluations": 40 if method != "optuna" else 20}
    config = workplace_config(workplace, search=settings)
    outcome = search(config, tmp_path / "run", session=replace(session, config=config))
    assert session.space.on_budget(outcome.best)
    best = json.loads((tmp_path / "run" / BEST).read_text())
    assert best["mask"] == outcome.best.key
    assert best["cost_tokens"] == outcome.cost_tokens
    assert best["evaluations"] <= 40


def test_a_search_that_nothing_would_end_is_refused_first(workplace: Path, tmp_path: Path) -> None:
    unlimited: dict[str, Any] = {"method": "surrogate", "max_evaluations": None}
    config = workplace_config(workplace, search=unlimited, model={"path": "./missing"})
    keys = r"\.cost_tokens, search\.max_evaluations or search\.patience"
    with pytest.raises(ConfigError, match=rf"'surrogate' goes on until a limit .*{keys}"):
        search(config, tmp_path / "run")
    ends = [{"patience": 3}, {"cost_tokens": 1e5}, {"max_evaluations": 9}, {"method": "greedy"}]
    for limit in ends:
        changes = {"search": unlimited | limit, "model": {"path": "./missing"}}
        with pytest.raises(ModelError):
            search(workplace_config(workplace, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_holds_everything(finished: Path, session: Session) -> None:
    assert listing(finished) == [BEST, CONFIG, JOURNAL]
    assert load_config(finished / CONFIG) == session.config == run_config(finished)
    records = read_journal(finished / JOURNAL)
    assert [records[0]["op"], records[-1]["op"]] == ["start", "end"]
    assert records[0]["space"] == json.loads(json.dumps(session.space.to_json()))
    best = json.loads((finished / BEST).read_text())
    assert best["signature"] == records[0]["signature"]
    assert records[-1]["best"] == best["mask"]


def test_the_same_search_again_is_the_same_byte_for_byte(
    finished: Path, session: Session, tmp_path: Path
) -> None:
    search(session.config, tmp_path / "again", session=session)
    assert journal_of(tmp_path / "again") == journal_of(finished)
    assert (tmp_path / "again" / BEST).read_bytes() == (finished / BEST).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_bytes() == (finished / CONFIG).read_bytes()


def test_the_journal_names_no_folder_of_this_machine(finished: Path, workplace: Path) -> None:
    assert str(workplace.parent) not in journal_of(finished)


def test_a_run_moved_with_its_model_is_resumed(
    finished: Path, session: Session, workplace: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").symlink_to(workplace)
    moved = session.config.model_dump(mode="json")
    for section, key in (("model", "path"), ("calibration", "text")):
        moved[section][key] = moved[section][key].replace(
            str(workplace), str(tmp_path / "elsewhere")
        )
    run = copy_of(finished, tmp_path)
    (run / CONFIG).write_text(json.dumps(moved))
    resume(run)
    assert journal_of(run) == journal_of(finished)


@pytest.mark.parametrize("stop", [1, 5, 12])
def test_a_stopped_run_is_continued(
    finished: Path, session: Session, tmp_path: Path, stop: int
) -> None:
    calls = 0

    def on_progress(_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise StoppedError

    out = tmp_path / "run"
    with pytest.raises(StoppedError):
        search(session.config, out, session=session, on_progress=on_progress)
    assert listing(out) == [CONFIG, JOURNAL]
    assert len(read_journal(out / JOURNAL)) < len(read_journal(finished / JOURNAL))
    resume(out, session=session)
    assert journal_of(out) == journal_of(finished)
    assert (out / BEST).read_bytes() == (finished / BEST).read_bytes()


def test_resuming_a_finished_run_changes_nothing(
    finished: Path, session: Session, tmp_path: Path
) -> None:
    run = copy_of(finished, tmp_path, CONFIG, JOURNAL, BEST)
    resume(run, session=session)
    for name in (CONFIG, JOURNAL, BEST):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert listing(run) == listing(finished)


def test_best_json_is_written_last(session: Session, tmp_path: Path) -> None:
    """Where the report fails the run is not finished, and resuming finishes it."""
    out = tmp_path / "run"

    def fails(run: Path) -> None:
        assert read_journal(run / JOURNAL)[-1]["op"] == "end"
        raise StoppedError

    with pytest.raises(StoppedError):
        search(session.config, out, session=session, finish=fails)
    assert listing(out) == [CONFIG, JOURNAL]
    reported: list[Path] = []
    resume(out, session=session, finish=reported.append)
    assert reported == [out]
    assert listing(out) == [BEST, CONFIG, JOURNAL]


class TestRefusals:
    def test_an_existing_directory_is_untouched(self, finished: Path, session: Session) -> None:
        before = {name: (finished / name).read_bytes() for name in listing(finished)}
        with pytest.raises(RunDirectoryError, match="depthsearch resume"):
            search(session.config, finished, session=session)
        assert {name: (finished / name).read_bytes() for name in listing(finished)} == before

    def test_too_little_text_leaves_nothing_behind(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        config = workplace_config(workplace, calibration={"select_tokens": 10**6})
        with pytest.raises(DataError, match="lower select_tokens"):
            search(config, tmp_path / "run", session=replace(session, config=config))
        assert listing(tmp_path) == []

    def test_a_space_too_large_to_list_leaves_nothing_behind(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        exhaustive = {"method": "exhaustive", "options": {"most": 2}}
        config = workplace_config(workplace, search=exhaustive)
        with pytest.raises(ConfigError, match="too large for the method 'exhaustive'"):
            search(config, tmp_path / "run", session=replace(session, config=config))
        assert listing(tmp_path) == []

    @pytest.mark.parametrize("method", ["windows", "angular_window"])
    def test_a_space_without_a_window_leaves_nothing_behind(
        self, session: Session, workplace: Path, tmp_path: Path, method: str
    ) -> None:
        space = replace(session.space, protected=frozenset(range(1, len(session.space.sites), 2)))
        config = workplace_config(workplace, search={"method": method})
        with pytest.raises(ConfigError, match=r"no contiguous window frees enough for .* at most"):
            search(config, tmp_path / "run", session=replace(session, config=config, space=space))
        assert listing(tmp_path) == []

    @pytest.mark.parametrize("missing", [CONFIG, JOURNAL])
    def test_what_is_no_run_directory_can_not_be_resumed(
        self, finished: Path, tmp_path: Path, missing: str
    ) -> None:
        run = copy_of(finished, tmp_path)
        (run / missing).unlink()
        with pytest.raises(RunDirectoryError, match=f"has no {missing}"):
            resume(run)
        with pytest.raises(RunDirectoryError, match="not a run directory"):
            resume(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("changes", "where"),
        [
            ({"search": {"seed": 1}}, r"signature\.data\.windows"),
            ({"search": {"finalists": 5}}, r"config\.search\.finalists"),
            ({"space": {"budget": {"drop_sites": 3}}}, r"config\.space"),
            ({"objective": {"kind": "cross_entropy"}}, r"signature\.protocol"),
        ],
    )
    def test_a_changed_configuration_diverges(
        self,
        finished: Path,
        session: Session,
        workplace: Path,
        tmp_path: Path,
        changes: dict[str, Any],
        where: str,
    ) -> None:
        run = copy_of(finished, tmp_path)
        config = workplace_config(workplace, **changes)
        with pytest.raises(JournalError, match=where):
            resume(run, session=replace(session, config=config))
        assert (run / JOURNAL).read_bytes() == (finished / JOURNAL).read_bytes()

    def test_a_changed_model_diverges(
        self, finished: Path, session: Session, tmp_path: Path
    ) -> None:
        run = copy_of(finished, tmp_path)
        loaded = replace(session.loaded, fingerprint="f" * 64)
        with pytest.raises(JournalError, match=r"signature\.model\.fingerprint"):
            resume(run, session=replace(session, loaded=loaded))

    def test_a_damaged_journal_is_refused(
        self, finished: Path, session: Session, tmp_path: Path
    ) -> None:
        run = copy_of(finished, tmp_path)
        lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
        lines[2] = lines[2][:20] + b"\n"
        (run / JOURNAL).write_bytes(b"".join(lines))
        with pytest.raises(JournalError, match="line 3"):
            resume(run, session=session)


def test_the_mask_found_is_the_one_evaluated(finished: Path, session: Session) -> None:
    """The losses in best.json are those of a fresh evaluation of its mask."""
    best = json.loads((finished / BEST).read_text())
    splits = session.splits(session.config.search.seed)
    mask = Mask.from_key(best["mask"])
    for windows, loss in ((splits.select, best["loss"]), (splits.finals, best["finals_loss"])):
        backend = session.backend(windows, session.config.search.seed)
        parts = [backend.run(batch, [mask]).losses[0] for batch in range(len(backend.sequences))]
        losses = [value for part in parts for value in part]
        assert sum(losses) / len(losses) == pytest.approx(loss, rel=1e-12)
