"""`cost_tokens` bounds a search also where finalists or repairs cost far more than plain passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.run.synthetic import Synthetic
from tests.searchers.landscapes import Landscape, toy

from depthsearch.errors import NothingFoundError
from depthsearch.evaluation import Racing
from depthsearch.journal import Journal, read_journal
from depthsearch.run.ledger import Ledger
from depthsearch.run.loop import Outcome, SearchLoop
from depthsearch.run.planning import Plan, planned
from depthsearch.searchers import is_baseline
from depthsearch.space import Mask, Stage

SPACE = toy(12)
LANDSCAPE = Landscape(24, seed=3)

_NOTHING = 900.0
"""Up to this a finalist with as many gaps as the first masks asked for has no room."""


class DearGaps(Synthetic):
    """A mask costs two dense passes more for each of its gaps."""

    def _unit(self, masks: Sequence[Mask]) -> float:
        return super()._unit(masks) + 16.0 * self.rows * sum(len(mask.runs) for mask in masks)


class FittedOnce(Synthetic):
    """A site costs 60 tokens once when it is first dropped."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        super().__init__(landscape, seed)
        self._fitted: set[int] = set()

    def plan(self, masks: Sequence[Mask]) -> float:
        return super().plan(masks) + self.once(masks)

    def once(self, masks: Sequence[Mask]) -> float:
        return 60.0 * len(self._new(masks))

    def prepare(self, masks: Sequence[Mask]) -> float:
        cost = self.once(masks)
        self._fitted |= self._new(masks)
        return cost

    def _new(self, masks: Sequence[Mask]) -> set[int]:
        dropped = {site for mask in masks for site, kept in enumerate(mask.keep) if not kept}
        return dropped - self._fitted


def run(path: Path, plan: Plan, select: Synthetic, finals: Synthetic) -> Outcome:
    with Journal(path / "journal.jsonl") as journal:
        return SearchLoop(Ledger(journal), SPACE, plan, select, finals).run(
            {"version": "0", "signature": {}}
        )


@pytest.mark.parametrize("limit", [900.0, 1400.0, 1800.0, 2600.0, 6000.0])
@pytest.mark.parametrize("method", ["random", "surrogate", "evolution"])
def test_finalists_with_many_gaps_do_not_break_the_limit(
    method: str, limit: float, tmp_path: Path
) -> None:
    plan = Plan(method, cost_tokens=limit, racing=False)
    select, finals = Synthetic(LANDSCAPE, seed=1), DearGaps(LANDSCAPE, seed=2)
    first = SPACE.windows()[0]
    dear = SPACE.decode(np.tile([0.0, 1.0], 12).tolist())
    assert finals.plan([dear]) > 4 * finals.plan([first])
    try:
        assert run(tmp_path, plan, select, finals).cost_tokens <= limit
    except NothingFoundError:
        assert limit <= _NOTHING


def test_a_limit_that_leaves_no_mask_says_so(tmp_path: Path) -> None:
    plan = Plan("random", cost_tokens=_NOTHING, racing=False)
    with pytest.raises(NothingFoundError, match="leaves nothing for a first mask"):
        run(tmp_path, plan, Synthetic(LANDSCAPE, seed=1), DearGaps(LANDSCAPE, seed=2))


def test_what_is_paid_once_is_not_saved_by_stages() -> None:
    rng = np.random.default_rng(0)
    masks = [SPACE.decode(rng.random(24).tolist()) for _ in range(8)]
    plain, once = Synthetic(LANDSCAPE, seed=1), FittedOnce(LANDSCAPE, seed=1)
    stages = (Stage(0.2, 2),)
    assert once.once(masks) > 0
    found = planned(once, masks, stages)
    assert found == pytest.approx(planned(plain, masks, stages) + once.once(masks))


@pytest.mark.parametrize("limit", [1400.0, 1800.0, 3000.0])
@pytest.mark.parametrize("method", ["evopress", "random"])
def test_repairs_that_are_paid_once_stay_within_the_limit(
    method: str, limit: float, tmp_path: Path
) -> None:
    plan = Plan(method, cost_tokens=limit, racing=Racing("halving"))
    select, finals = FittedOnce(LANDSCAPE, seed=1), Synthetic(LANDSCAPE, seed=2)
    assert run(tmp_path, plan, select, finals).cost_tokens <= limit


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_no_room_is_kept_for_a_baseline_that_never_comes(method: str, tmp_path: Path) -> None:
    plan = Plan(method, finalists=1, racing=False)

    def go(name: str, cost_tokens: float | None) -> Outcome:
        select, finals = Synthetic(LANDSCAPE, seed=1), Synthetic(LANDSCAPE, seed=2)
        (tmp_path / name).mkdir()
        return run(tmp_path / name, replace(plan, cost_tokens=cost_tokens), select, finals)

    free = go("free", None)
    asks = [r for r in read_journal(tmp_path / "free/journal.jsonl") if r["op"] == "ask"]
    assert not any(is_baseline(p["origin"]) for r in asks for p in r["proposals"])
    assert go("limited", free.cost_tokens).best == free.best
