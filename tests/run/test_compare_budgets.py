"""Comparisons at several budgets, and what masks found on the way are worth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_runs import workplace_config

from depthsearch.config import RunConfig, load_config
from depthsearch.errors import BudgetError, NothingFoundError
from depthsearch.evaluation import InProcess
from depthsearch.journal import read_journal
from depthsearch.model.repair import patched
from depthsearch.model.switches import masked
from depthsearch.run.anytime import improvements
from depthsearch.run.compare import compare
from depthsearch.run.directory import CONFIG, JOURNAL, sections
from depthsearch.run.session import Session
from depthsearch.run.verdict import ONE_SEED, few_documents
from depthsearch.space import Mask

PARAMS, CACHE = {"keep_params": 0.7, "of": "blocks"}, {"keep_kv_bytes": 0.5}
NAMES = ("keep_params-0.7-of-blocks", "keep_kv_bytes-0.5")
ARMS: dict[str, Any] = {
    "evo": {"method": "evolution", "max_evaluations": 60, "batch": 2},
    "greedy": {"method": "greedy", "max_evaluations": None},
    "win": {"method": "windows"},
}
COMPARE: dict[str, Any] = {
    "arms": ARMS,
    "seeds": [0, 1],
    "cost_tokens": "greedy",
    "budgets": [PARAMS, CACHE],
}


@pytest.fixture(scope="module")
def config(workplace: Path) -> RunConfig:
    return workplace_config(workplace, compare=COMPARE)


@pytest.fixture(scope="module")
def finished(
    session: Session, config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], int]:
    """The comparison, and how often batches of the dense model were recorded for held-out text."""
    out = tmp_path_factory.mktemp("budgets") / "out"
    judges: list[InProcess] = []
    opened = replace(session, config=config)
    judge = Session.judge

    def counted(self: Session, windows: torch.Tensor) -> Any:
        judges.append(judge(self, windows))  # type: ignore[arg-type]
        return judges[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "judge", counted)
        result = compare(config, out, session=opened)
    return out, result, len(judges)


def heldout_kl(session: Session, key: str) -> list[float]:
    """KL to the dense model by window, from two plain passes of the model."""
    windows, model = session.splits(0).heldout, session.loaded.model
    with torch.no_grad():
        reference = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
        with masked(model, session.anatomy, Mask.from_key(key)):
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1].log_softmax(-1)
    found: list[float] = (reference.exp() * (reference - logits)).sum(-1).mean(-1).tolist()
    return found


def test_every_arm_seed_and_budget_is_a_run_of_its_own(
    finished: tuple[Path, dict[str, Any], int],
) -> None:
    out, result, _ = finished
    assert [part["budget"] for part in result["budgets"]] == list(NAMES)
    folders = {f"{a}-{name}-seed{s}" for a in ARMS for name in NAMES for s in (0, 1)}
    assert {path.name for path in (out / "arms").iterdir()} == folders
    for part, budget in zip(result["budgets"], (PARAMS, CACHE), strict=True):
        assert part["failed"] == []
        for arm in part["arms"]:
            run = load_config(out / arm["run"] / CONFIG)
            assert run.space.budget.model_dump(exclude_none=True).items() >= budget.items()
            best = json.loads((out / arm["run"] / "best.json").read_text())
            assert (best["mask"], best["cap"]) == (arm["mask"], part["cap"])
            assert arm["cost"] <= part["cap"] < part["dense_cost"]
    assert result == json.loads((out / "compare.json").read_text())


def test_each_budget_and_seed_sets_its_own_cost(
    finished: tuple[Path, dict[str, Any], int],
) -> None:
    out, result, _ = finished
    limits = set()
    for part in result["budgets"]:
        spent = {(a["name"], a["seed"]): a["cost_tokens"] for a in part["arms"]}
        for seed in (0, 1):
            for arm in ("evo", "win"):
                own = load_config(out / f"arms/{arm}-{part['budget']}-seed{seed}" / CONFIG).search
                assert own.cost_tokens == spent["greedy", seed]
            limits.add(spent["greedy", seed])
    assert len(limits) > 2


def test_sections_are_those_of_a_comparison_at_one_budget(
    finished: tuple[Path, dict[str, Any], int],
    session: Session,
    config: RunConfig,
    workplace: Path,
    tmp_path: Path,
) -> None:
    """The figures of the second budget are the same when it is compared alone."""
    _, result, judged = finished
    assert judged == 1
    single = workplace_config(workplace, compare={**COMPARE, "budgets": [CACHE]})
    alone = compare(single, tmp_path / "alone", session=replace(session, config=single))
    assert sorted(path.name for path in (tmp_path / "alone/arms").iterdir())[0] == "evo-seed0"
    assert sections(alone) == [alone]
    part = sections(result)[1]
    # Of the whole comparison, it is said once.
    said = f" {few_documents(3)}"
    assert result["verdict"].endswith(said)
    assert alone["verdict"].endswith(said)
    alone["verdict"] = alone["verdict"].removesuffix(said)
    assert set(part) == set(alone) - {"version", "signature"}
    timeless = [
        json.dumps(
            {
                "arms": [
                    {k: v for k, v in arm.items() if k not in ("seconds", "run")}
                    for arm in found["arms"]
                ],
                "summary": [
                    {k: v for k, v in row.items() if k != "seconds_mean"}
                    for row in found["summary"]
                ],
                **{
                    key: found[key]
                    for key in (
                        "budget", "budget_text", "cap", "dense_cost", "dense", "cost_tokens",
                        "pairs", "ranks", "anytime", "correlation", "warnings", "verdict",
                        "failed", "sites",
                    )
                },
            }
        )
        for found in (part, alone)
    ]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_ranks_are_over_all_seeds_and_budgets(
    finished: tuple[Path, dict[str, Any], int],
) -> None:
    _, result, _ = finished
    places: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for part in result["budgets"]:
        for seed in (0, 1):
            found = {a["name"]: a["heldout_kl"] for a in part["arms"] if a["seed"] == seed}
            for arm, loss in found.items():
                worse = sum(other < loss for other in found.values())
                equal = sum(other == loss for other in found.values())
                places[arm].append(worse + (equal + 1) / 2)
    ranks = {row["arm"]: row for row in result["ranks"]}
    assert {arm: row["rank_mean"] for arm, row in ranks.items()} == pytest.approx(
        {arm: np.mean(found) for arm, found in places.items()}
    )
    assert sum(row["first_share"] for row in result["ranks"]) == pytest.approx(1)
    assert [row["rank_mean"] for row in result["ranks"]] == sorted(
        row["rank_mean"] for row in result["ranks"]
    )
    first = result["ranks"][0]
    shared = [row["arm"] for row in result["ranks"] if row["rank_mean"] == first["rank_mean"]]
    best = f"{100 * first['first_share']:.0f} % of resamples."
    if len(shared) > 1:
        best = f"{' and '.join(shared)} share the best mean rank over budgets and seeds, "
        best += f"{first['rank_mean']:.2f} of {len(result['ranks'])}."
    assert best in result["verdict"]


def test_masks_on_the_way_are_those_of_the_journal_measured_on_held_out_text(
    finished: tuple[Path, dict[str, Any], int], session: Session
) -> None:
    out, result, _ = finished
    several = 0
    for part in result["budgets"]:
        for arm in part["arms"]:
            course = improvements(read_journal(out / arm["run"] / JOURNAL))
            assert arm["anytime"] == [[found.cost_tokens, found.loss] for found in course]
            shown = arm["anytime_heldout"]
            assert 1 <= len(shown) <= 6
            several += len(shown) > 1
            known = {(f.cost_tokens, f.loss, f.mask) for f in course}
            assert {(s["cost_tokens"], s["select_loss"], s["mask"]) for s in shown} <= known
            for entry in shown:
                losses = heldout_kl(session, entry["mask"])
                assert entry["heldout_kl"] == pytest.approx(np.mean(losses), abs=2e-5)
            assert arm["gap"] == pytest.approx(arm["heldout_kl"] - arm["select_loss"])
        for course, row in zip(part["anytime"], part["summary"], strict=True):
            # The line of an arm ends at its answers.
            assert course["arm"] == row["arm"]
            assert course["points"][-1]["heldout_kl_mean"] == pytest.approx(row["heldout_kl_mean"])
    assert several > 0


def test_nothing_is_measured_on_the_way_where_that_is_not_wanted(
    session: Session, workplace: Path, tmp_path: Path
) -> None:
    few = {"arms": {"win": ARMS["win"], "b": {"method": "block_influence"}}, "seeds": [0]}
    config = workplace_config(workplace, compare={**few, "anytime": 0})
    result = compare(config, tmp_path / "out", session=replace(session, config=config))
    assert result["anytime"] == []
    assert [arm["anytime_heldout"] for arm in result["arms"]] == [[], []]
    assert result["correlation"] is None
    assert result["verdict"].endswith(ONE_SEED)


def test_masks_on_the_way_of_a_repaired_search_are_repaired_too(
    workplace: Path, tmp_path: Path
) -> None:
    config = workplace_config(
        workplace,
        calibration={"fit_tokens": 128, "finals_fit_tokens": 512},
        search={"max_evaluations": 30, "finalists": 1, "finish": "gap", "batch": 2},
        compare={"arms": {"evo": {}, "table": {"repair": "table"}}, "seeds": [0], "anytime": 4},
    )
    session = Session.open(config)
    result = compare(config, tmp_path / "out", session=session)
    arm, looked_up = result["arms"]
    # The search judged masks as cut; the other one judged what no held-out figure measures.
    assert arm["gap"] == pytest.approx(arm["cut_kl"] - arm["select_loss"])
    assert looked_up["gap"] is None
    shown = arm["anytime_heldout"]
    assert len({entry["mask"] for entry in shown}) > 1
    windows, model = session.splits(0).heldout, session.loaded.model
    with torch.no_grad():
        reference = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    alone = replace(session, config=load_config(tmp_path / "out" / arm["run"] / CONFIG))
    for entry in shown:
        mask = Mask.from_key(entry["mask"])
        patches = alone.repair(mask, alone.splits(0), 0)
        with (
            torch.no_grad(),
            patched(model, session.anatomy, patches),
            masked(model, session.anatomy, mask),
        ):
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1].log_softmax(-1)
        kl = (reference.exp() * (reference - logits)).sum(-1).mean()
        assert entry["heldout_kl"] == pytest.approx(float(kl), abs=2e-5)
        assert entry["heldout_kl"] < np.mean(heldout_kl(session, entry["mask"]))


SHORT: dict[str, Any] = {"method": "greedy", "max_evaluations": 9}


class TestFailures:
    """Greedy removal that may judge nine masks comes one site far, which one budget asks for."""

    def compared(
        self, session: Session, workplace: Path, out: Path, **changes: Any
    ) -> dict[str, Any]:
        settings = {"seeds": [0], "budgets": [PARAMS, {"drop_sites": 1}], **changes}
        config = workplace_config(workplace, compare=settings)
        return compare(config, out, session=replace(session, config=config))

    def test_an_arm_that_fails_at_one_budget_is_named_there_alone(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        """Its one mask drops one site, which meets the second budget."""
        arms = {"short": SHORT, "win": ARMS["win"]}
        result = self.compared(session, workplace, tmp_path / "out", arms=arms)
        first, second = result["budgets"]
        assert [(f["name"], f["seed"]) for f in first["failed"]] == [("short", 0)]
        assert [row["arm"] for row in first["summary"]] == ["win"]
        assert second["failed"] == []
        assert [row["arm"] for row in second["summary"]] == ["short", "win"]
        assert [row["arm"] for row in result["ranks"]] == ["win"]

    def test_a_budget_whose_cost_nobody_set_is_left_out(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        arms = {"short": SHORT, "win": ARMS["win"]}
        result = self.compared(session, workplace, tmp_path / "out", arms=arms, cost_tokens="short")
        first, second = result["budgets"]
        assert [f["name"] for f in first["failed"]] == ["short", "win"]
        assert "'short', whose cost it was to get, failed" in first["failed"][1]["error"]
        assert (first["summary"], first["arms"], first["ranks"]) == ([], [], [])
        assert [row["arm"] for row in second["summary"]] == ["short", "win"]
        assert {row["arm"] for row in result["ranks"]} == {"short", "win"}

    def test_nothing_is_left(self, session: Session, workplace: Path, tmp_path: Path) -> None:
        with pytest.raises(NothingFoundError, match="no arm finished"):
            self.compared(
                session,
                workplace,
                tmp_path / "out",
                arms={"short": SHORT},
                budgets=[PARAMS, {"drop_sites": 3}],
            )
        assert not (tmp_path / "out/compare.json").exists()

    def test_a_budget_that_no_mask_meets_is_refused_before_anything_runs(
        self, session: Session, workplace: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(BudgetError, match="the budget cannot be met: params at most 1 %"):
            self.compared(
                session,
                workplace,
                tmp_path / "out",
                arms={"win": ARMS["win"]},
                budgets=[CACHE, {"keep_params": 0.01}],
            )
        assert not (tmp_path / "out").exists()


def test_it_is_continued_in_the_middle_of_a_budget(
    finished: tuple[Path, dict[str, Any], int],
    session: Session,
    config: RunConfig,
    tmp_path: Path,
) -> None:
    done, result, _ = finished
    out = tmp_path / "out"
    runs: list[str] = []

    def stop(arm: str, seed: int, place: int, count: int) -> None:
        runs.append(f"{arm} {seed} {place}/{count}")
        if place == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config, out, session=replace(session, config=config), on_arm=stop)
    assert runs[0] == "keep_params-0.7-of-blocks greedy 0 0/12"
    assert runs[7] == "keep_kv_bytes-0.5 evo 0 7/12"
    again = compare(config, out, session=replace(session, config=config))
    for part, other in zip(result["budgets"], again["budgets"], strict=True):
        assert [a["mask"] for a in part["arms"]] == [a["mask"] for a in other["arms"]]
        assert part["ranks"] == other["ranks"]
        assert part["anytime"] == other["anytime"]
    assert again["verdict"] == result["verdict"]
    assert sorted(p.name for p in (out / "arms").iterdir()) == sorted(
        p.name for p in (done / "arms").iterdir()
    )
