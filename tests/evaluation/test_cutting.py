from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from depthsearch.evaluation import executed_sites
from depthsearch.evaluation.cutting import HEAD, Pool, Run, Sheet
from depthsearch.space import Mask

SITES = 9
sets = st.sets(st.integers(0, 2**SITES - 1), min_size=1, max_size=24).map(
    lambda found: [Mask.from_key(f"{n:0{SITES}b}") for n in sorted(found, reverse=True)]
)
REMOVALS = Sheet(Mask.dropping(60, [site]) for site in range(60))


@given(masks=sets, data=st.data())
def test_a_run_costs_what_it_executes(masks: list[Mask], data: st.DataObject) -> None:
    sheet = Sheet(masks)
    start = data.draw(st.integers(0, len(masks) - 1))
    stop = data.draw(st.integers(start + 1, len(masks)))
    run = sheet.masks[start:stop]
    assert list(sheet.masks) == sorted(masks, key=lambda mask: mask.key)
    assert sheet.cost(start, stop) == sum(executed_sites(run)) + HEAD * len(run)


@given(masks=sets, targets=st.lists(st.floats(0, 80), min_size=30, max_size=30))
def test_units_part_a_run_without_loss_and_near_the_target(
    masks: list[Mask], targets: list[float]
) -> None:
    pool = Pool()
    pool.add(Run.of(3, masks))
    given_out: list[Mask] = []
    for target in targets:
        if not pool:
            break
        (run,) = pool
        assert pool.cost == run.cost
        part = pool.take(run, target)
        assert part.masks
        assert len(part.masks) == 1 or part.cost <= 1.2 * target
        given_out += part.masks
    given_out += [mask for run in pool for mask in run.masks]
    assert sorted(mask.key for mask in given_out) == sorted(mask.key for mask in masks)


def test_masks_that_share_much_stay_together() -> None:
    # Late removals differ only behind a long common prefix; early ones share next to nothing.
    start, stop = REMOVALS.cut(0, 60, 600)
    assert stop == 60
    assert 20 < start < 50
    assert REMOVALS.cut(0, 30, 61) == (0, 1)
    assert REMOVALS.cut(0, 60, math.inf) == (0, 60)


def test_a_cut_keeps_within_a_family() -> None:
    first, second = ([Mask.dropping(20, [gone, n]) for n in (16, 17, 18)] for gone in (0, 1))
    sheet = Sheet([*first, *second])
    start, stop = sheet.cut(0, 6, sheet.cost(0, 3) * 1.1)
    assert set(sheet.masks[start:stop]) in (set(first), set(second))


def test_a_suspect_run_is_not_cut() -> None:
    pool = Pool()
    run = Run.of(0, REMOVALS.masks, ["w0"])
    pool.add(run)
    assert pool.take(run, 1.0) is run
    assert not pool
    assert pool.cost == 0


def test_a_mask_given_up_leaves_every_run() -> None:
    pool = Pool()
    poison, *others = REMOVALS.masks
    pool.add(Run.of(0, REMOVALS.masks))
    pool.add(Run.of(1, [poison]))
    pool.add(Run.of(2, others, ["w1"]))
    pool.discard(poison)
    assert [(run.batch, run.tried) for run in pool] == [(0, frozenset()), (2, {"w1"})]
    assert all(set(run.masks) == set(others) for run in pool)
    assert pool.cost == 2 * Sheet(others).cost(0, len(others))
    assert pool.cost_of(2) == Sheet(others).cost(0, len(others))
