from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_runs import workplace_config

from depthsearch.config import RunConfig, load_config
from depthsearch.errors import (
    ConfigError,
    DataError,
    ModelError,
    NothingFoundError,
    RunDirectoryError,
)
from depthsearch.journal import read_journal
from depthsearch.run.compare import compare, read_compare
from depthsearch.run.directory import BEST, CONFIG, JOURNAL
from depthsearch.run.heldout import Heldout, measure
from depthsearch.run.session import Session
from depthsearch.space import Mask

COMPARE: dict[str, Any] = {
    "arms": {
        "evo": {"method": "evolution", "max_evaluations": None},
        "greedy": {"method": "greedy", "max_evaluations": None},
    },
    "seeds": [0, 1],
    "cost_tokens": "greedy",
}


@pytest.fixture(scope="module")
def config(workplace: Path) -> RunConfig:
    return workplace_config(workplace, compare=COMPARE)


@pytest.fixture(scope="module")
def finished(
    session: Session, config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("compared") / "out"
    return out, compare(config, out, session=replace(session, config=config))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_arm_and_seed_is_a_run_of_its_own(
    finished: tuple[Path, dict[str, Any]], config: RunConfig
) -> None:
    out, result = finished
    assert load_config(out / CONFIG) == config
    assert read_compare(out) == result == json.loads((out / "compare.json").read_text())
    runs = {(arm["name"], arm["seed"]): out / arm["run"] for arm in result["arms"]}
    assert set(runs) == {(name, seed) for name in ("evo", "greedy") for seed in (0, 1)}
    for (name, seed), run in runs.items():
        assert sorted(path.name for path in run.iterdir()) == [BEST, CONFIG, JOURNAL]
        own = load_config(run / CONFIG)
        assert own.compare is None
        assert (own.search.method, own.search.seed) == (config.compare.arms[name].method, seed)  # type: ignore[union-attr]
        best = json.loads((run / BEST).read_text())
        entry = next(a for a in result["arms"] if (a["name"], a["seed"]) == (name, seed))
        assert entry["mask"] == best["mask"]
        assert entry["cost_tokens"] == best["cost_tokens"]
        assert entry["select_loss"] == best["loss"]


def test_arms_have_equal_cost(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    spent = {(a["name"], a["seed"]): a["cost_tokens"] for a in result["arms"]}
    for seed in (0, 1):
        limit = load_config(out / f"arms/evo-seed{seed}" / CONFIG).search.cost_tokens
        assert limit == spent["greedy", seed]
        assert 0.6 * limit < spent["evo", seed] <= limit
        assert load_config(out / f"arms/greedy-seed{seed}" / CONFIG).search.cost_tokens is None


def test_the_document_has_what_reports_and_people_read(
    finished: tuple[Path, dict[str, Any]], session: Session
) -> None:
    _, result = finished
    assert set(result) == {
        "version", "signature", "budget_text", "cap", "dense_cost", "dense", "cost_tokens",
        "arms", "summary", "pairs", "verdict", "sites", "failed",
        "budget", "ranks", "anytime", "correlation", "warnings",
    }  # fmt: skip
    assert result["sites"] == [site.name for site in session.space.sites]
    assert result["signature"]["seed"] == [0, 1]
    assert result["failed"] == []
    assert set(result["dense"]) == {"heldout_kl", "heldout_ce", "perplexity"}
    for arm in result["arms"]:
        assert set(arm) == {
            "name", "method", "seed", "run", "mask", "origin", "cost", "cost_tokens",
            "evaluations", "seconds", "select_loss", "finals_loss", "anytime", "heldout_kl",
            "heldout_kl_stderr", "heldout_ce", "heldout_ce_stderr", "heldout_losses",
            "cut_kl", "cut_ce", "repair", "gap", "anytime_heldout", "search_repair", "score",
            "baseline", "toward_text",
        }  # fmt: skip
        assert arm["cost"] <= result["cap"] < result["dense_cost"]
    for row in result["summary"]:
        assert set(row) == {
            "arm", "method", "seeds", "heldout_kl_mean", "heldout_kl_low", "heldout_kl_high",
            "heldout_ce_mean", "cut_kl_mean", "repaired", "finish", "select_loss_mean",
            "cost_tokens_mean", "evaluations_mean", "seconds_mean", "gap_mean", "gap_low",
            "gap_high", "baselines",
        }  # fmt: skip
        assert row["heldout_kl_low"] <= row["heldout_kl_mean"] <= row["heldout_kl_high"]
    assert [row["arm"] for row in result["summary"]] == ["evo", "greedy"]
    (pair,) = result["pairs"]
    assert set(pair) == {"a", "b", "difference", "low", "high", "verdict", "among"}
    means = {row["arm"]: row["heldout_kl_mean"] for row in result["summary"]}
    assert pair["difference"] == pytest.approx(means["evo"] - means["greedy"])
    said = {"evo is better": -1, "greedy is better": 1, "no difference shown": 0}
    side = int(pair["low"] > 0) - int(pair["high"] < 0)
    assert said[pair["verdict"]] == side
    assert result["verdict"].startswith(min(means, key=means.__getitem__))


def test_held_out_figures_are_those_of_the_masks(
    finished: tuple[Path, dict[str, Any]], session: Session
) -> None:
    _, result = finished
    windows = session.splits(0).heldout
    model = session.loaded.model
    with torch.no_grad():
        dense = model(input_ids=windows, labels=windows).loss
    assert result["dense"]["heldout_kl"] == pytest.approx(0, abs=1e-5)
    assert result["dense"]["heldout_ce"] == pytest.approx(float(dense), rel=1e-5)
    assert result["dense"]["perplexity"] == pytest.approx(float(dense.exp()), rel=1e-4)
    from depthsearch.model.switches import masked

    with torch.no_grad():
        reference = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
        for arm in result["arms"]:
            with masked(model, session.anatomy, Mask.from_key(arm["mask"])):
                logits = model(input_ids=windows, use_cache=False).logits[:, :-1].log_softmax(-1)
            kl = (reference.exp() * (reference - logits)).sum(-1).mean(-1)
            assert arm["heldout_losses"] == pytest.approx(kl.tolist(), abs=2e-5)
            assert arm["heldout_kl"] == pytest.approx(float(np.mean(arm["heldout_losses"])))


def test_the_anytime_curve_falls_and_is_in_the_journal(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    out, result = finished
    for arm in result["arms"]:
        costs, losses = zip(*arm["anytime"], strict=True)
        assert list(costs) == sorted(costs)
        assert list(losses) == sorted(losses, reverse=True)
        told = [r for r in read_journal(out / arm["run"] / JOURNAL) if r["op"] == "tell"]
        assert {(r["cost_tokens"]) for r in told} >= set(costs)
        found = {e["loss"] for r in told for e in r["evaluations"] if e["status"] == "ok"}
        assert found >= set(losses)


def test_it_can_be_continued_at_any_point(
    finished: tuple[Path, dict[str, Any]], session: Session, config: RunConfig, tmp_path: Path
) -> None:
    done, result = finished
    out = tmp_path / "out"
    for name, data in contents(done).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    (out / "compare.json").unlink()
    (out / "arms/greedy-seed1" / BEST).unlink()
    torn = out / "arms/evo-seed1" / JOURNAL
    torn.write_bytes(torn.read_bytes()[:-700])
    (out / "arms/evo-seed1" / BEST).unlink()
    calls: list[tuple[str, int, int, int]] = []
    again = compare(
        config,
        out,
        session=replace(session, config=config),
        on_arm=lambda *call: calls.append(call),
    )
    timeless = [
        {**{k: v for k, v in r.items() if k not in ("arms", "summary")},
         "arms": [{k: v for k, v in a.items() if k != "seconds"} for a in r["arms"]],
         "summary": [{k: v for k, v in a.items() if k != "seconds_mean"} for a in r["summary"]]}
        for r in (result, again)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]
    same = {name for name in contents(done) if not name.endswith((JOURNAL, "compare.json"))}
    assert {name: contents(out)[name] for name in same} == {
        name: contents(done)[name] for name in same
    }
    # The arm that sets the cost goes first, seed by seed.
    assert calls == [("greedy", 0, 0, 4), ("evo", 0, 1, 4), ("greedy", 1, 2, 4), ("evo", 1, 3, 4)]


class TestRefusals:
    def untouched(self, out: Path, config: RunConfig, message: str, **settings: Any) -> None:
        before = contents(out)
        with pytest.raises(RunDirectoryError, match=message):
            compare(config, out, **settings)
        assert contents(out) == before

    def test_a_finished_comparison(
        self, finished: tuple[Path, dict[str, Any]], config: RunConfig
    ) -> None:
        self.untouched(finished[0], config, "finished comparison and is never overwritten")

    def test_a_run_directory(
        self, finished: tuple[Path, dict[str, Any]], config: RunConfig, tmp_path: Path
    ) -> None:
        self.untouched(finished[0] / "arms/evo-seed0", config, "not a comparison")
        self.untouched(tmp_path, config, "not a comparison")

    def test_another_comparison(
        self, session: Session, config: RunConfig, workplace: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compare(config, out, session=replace(session, config=config), on_arm=stop)
        assert list(contents(out)) == [CONFIG]
        other = workplace_config(workplace, compare={**COMPARE, "seeds": [5]})
        self.untouched(out, other, "unfinished comparison with another configuration")

    @pytest.mark.parametrize("ended", [True, False])
    def test_arms_that_were_searched_on_another_text(
        self,
        finished: tuple[Path, dict[str, Any]],
        session: Session,
        config: RunConfig,
        tmp_path: Path,
        ended: bool,
    ) -> None:
        """The other arms are to come, and would see the text as it is now."""
        out = tmp_path / "out"
        shutil.copytree(finished[0], out)
        (out / "compare.json").unlink()
        shutil.rmtree(out / "arms/evo-seed1")
        if not ended:
            (out / "arms/greedy-seed0" / BEST).unlink()
        texts = (*session.documents.texts[1:], "A text that was not there before.")
        documents = replace(session.documents, texts=texts)
        changed = replace(session, config=config, documents=documents)
        self.untouched(
            out, config, r"-seed0 was searched on .*signature\.data.* before and", session=changed
        )

    @pytest.mark.parametrize(
        ("changes", "kind"),
        [
            ({"calibration": {"text": "missing.txt"}}, DataError),
            ({"calibration": {"select_tokens": 10**6}}, DataError),
            ({"model": {"path": "./missing/model"}}, ModelError),
            ({"compare": {**COMPARE, "arms": {"a": {"method": "nothing"}}, "cost_tokens": None}},
             ConfigError),
            ({"compare": {**COMPARE, "arms": {"a": {"options": {"x": 1}}}, "cost_tokens": None}},
             ConfigError),
            ({"compare": None}, ConfigError),
            ({"compare": {**COMPARE, "cost_tokens": 10}}, ConfigError),
            (
                {"compare": {"arms": {"w": {"method": "windows"}, "x": {
                    "method": "exhaustive", "options": {"most": 2}}}}},
                ConfigError,
            ),
            (
                {"compare": {"arms": {"w": {"method": "windows"}, "o": {
                    "method": "optuna", "options": {"storage": "sqlite:////nowhere/x.db"}}}}},
                ConfigError,
            ),
            (
                {"compare": {"arms": {"w": {"method": "windows"}, "r": {
                    "method": "windows", "repair": "gap"}}}, "calibration": {"fit_tokens": 64}},
                DataError,
            ),
            (
                {"compare": {"arms": {"w": {"method": "windows"}, "r": {
                    "method": "windows", "finish": "gap"}}},
                 "calibration": {"finals_fit_tokens": 10**6}},
                DataError,
            ),
        ],
    )  # fmt: skip
    def test_bad_input_leaves_nothing_behind(
        self, workplace: Path, tmp_path: Path, changes: dict[str, Any], kind: type[Exception]
    ) -> None:
        config = workplace_config(workplace, **({"compare": COMPARE} | changes))
        with pytest.raises(kind):
            compare(config, tmp_path / "out")
        assert contents(tmp_path) == {}
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("cost", "name"), [(1000.0, r"compare\.cost_tokens"), (None, r"search\.cost_tokens")]
    )
    def test_a_limit_on_cost_is_named_as_it_is_set(
        self, session: Session, workplace: Path, tmp_path: Path, cost: float | None, name: str
    ) -> None:
        settings = {"arms": {"w": {"method": "windows"}}, "cost_tokens": cost}
        config = workplace_config(workplace, compare=settings, search={"cost_tokens": 1000.0})
        with pytest.raises(ConfigError, match=f"^the arm 'w': {name} is 1,000, too little"):
            compare(config, tmp_path / "out", session=replace(session, config=config))

    def test_reading_what_is_not_finished(self, tmp_path: Path) -> None:
        with pytest.raises(RunDirectoryError, match="no finished comparison"):
            read_compare(tmp_path)


@pytest.mark.parametrize(
    ("cost", "refused"), [(None, "r"), ("w", None), ("r", "r"), (4000.0, None)]
)
def test_each_arm_ends(
    workplace: Path, tmp_path: Path, cost: str | float | None, refused: str | None
) -> None:
    arms = {"w": {"method": "windows"}, "r": {"method": "random"}}
    changes: dict[str, Any] = {
        "search": {"max_evaluations": None},
        "compare": {"arms": arms, "cost_tokens": cost},
        "model": {"path": "./missing"},
    }
    kind: type[Exception] = ModelError
    message = "no such file"
    if refused is not None:
        kind, message = ConfigError, rf"the arm '{refused}' \(random\) goes on until a limit"
    with pytest.raises(kind, match=message):
        compare(workplace_config(workplace, **changes), tmp_path / "out")


def test_cost_may_be_fixed_or_left_to_the_search_section(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    arms = {"w": {"method": "windows"}, "r": {"method": "random"}}
    for place, (limit, expected) in enumerate([(4000.0, 4000.0), (None, 5000.0)]):
        settings = {"arms": arms, "seeds": [3], "cost_tokens": limit}
        config = workplace_config(
            workplace, compare=settings, search={"cost_tokens": 5000.0, "max_evaluations": 20}
        )
        out = tmp_path / str(place)
        result = compare(config, out, session=replace(session, config=config))
        for arm in result["arms"]:
            own = load_config(out / arm["run"] / CONFIG).search
            assert (own.cost_tokens, own.seed) == (expected, 3)
            assert arm["cost_tokens"] <= expected


SHORT: dict[str, Any] = {"method": "greedy", "max_evaluations": 1}
WINDOWS = {"method": "windows"}
ARMS: dict[str, Any] = {"short": SHORT, "w": WINDOWS}


class TestArmsThatFail:
    """Greedy removal that may judge one mask only never reaches the budget."""

    def compared(self, session: Session, folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
        config = workplace_config(folder, compare={"arms": ARMS, "seeds": [0]} | changes)
        return compare(config, out, session=replace(session, config=config))

    def test_they_are_named_and_the_others_compared(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        result = self.compared(session, workplace, tmp_path / "out")
        assert [row["arm"] for row in result["summary"]] == ["w"]
        assert [arm["name"] for arm in result["arms"]] == ["w"]
        (failed,) = result["failed"]
        assert (failed["name"], failed["seed"]) == ("short", 0)
        assert "none of 1 evaluated masks" in failed["error"]

    def test_without_any_other_nothing_was_found(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(NothingFoundError, match="no arm finished"):
            self.compared(session, workplace, tmp_path / "out", arms={"short": SHORT})
        assert not (tmp_path / "out" / "compare.json").exists()

    def test_the_others_do_not_run_without_the_limit_it_was_to_set(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(NothingFoundError, match="'short', whose cost the others get"):
            self.compared(session, workplace, tmp_path / "out", cost_tokens="short")
        assert [path.name for path in (tmp_path / "out/arms").iterdir()] == ["short-seed0"]

    def test_a_limit_too_low_for_an_arm_is_its_failure_alone(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        arms = {"b": {"method": "block_influence"}, "w": {"method": "windows"}}
        result = self.compared(session, workplace, tmp_path / "out", arms=arms, cost_tokens="b")
        assert [row["arm"] for row in result["summary"]] == ["b"]
        (failed,) = result["failed"]
        assert failed["name"] == "w"
        assert failed["error"].startswith("the cost of the arm 'b' is ")

    @pytest.mark.parametrize("answer", [True, False])
    def test_what_overflows_on_heldout_text_is_left_out(
        self,
        session: Session,
        workplace: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        answer: bool,
    ) -> None:
        """One window of a mask that was finite on all other text: an arm's answer, or before it."""
        out, arms = tmp_path / "out", {"r": {"method": "random", "batch": 1}, "w": WINDOWS}
        bad: list[str] = []

        def overflowing(at: Session, windows: torch.Tensor, runs: Any, on_heldout: Any) -> Heldout:
            found = measure(at, windows, runs, on_heldout)
            others = {mask for run in runs[1:] for mask in run.masks}
            bad.append(
                runs[0].answer
                if answer
                else next(m for m in runs[0].found if m != runs[0].answer and m not in others)
            )
            kl = (float("inf"), *found.cut[bad[0]].kl[1:])
            return Heldout({**found.cut, bad[0]: replace(found.cut[bad[0]], kl=kl)})

        with monkeypatch.context() as patch:
            patch.setattr("depthsearch.run.compare.measure", overflowing)
            result = self.compared(session, workplace, out, arms=arms)
        assert [row["arm"] for row in result["summary"]] == (["w"] if answer else ["r", "w"])
        shown = [step["mask"] for arm in result["arms"] for step in arm["anytime_heldout"]]
        assert shown
        assert bad[0] not in shown
        assert [lost["name"] for lost in result["failed"]] == (["r"] if answer else [])
        assert all("load the model in float32" in lost["error"] for lost in result["failed"])
