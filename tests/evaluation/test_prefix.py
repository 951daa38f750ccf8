from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthsearch.evaluation import executed_sites
from depthsearch.evaluation.prefix import PrefixWalk
from depthsearch.evaluation.turns import Turn, steps_of
from depthsearch.space import Mask

SITES = 8
ATTENTION, FFN = 7_077_888 // 4, 2 * 3 * 576 * 1536  # FLOPs of SmolLM2-135M's sublayers, roughly


def masks_of(sites: int = SITES) -> st.SearchStrategy[list[Mask]]:
    one = st.tuples(*[st.booleans()] * sites).map(Mask)
    return st.lists(one, min_size=1, max_size=12, unique=True)


def brute_force(masks: list[Mask], width: int) -> list[int]:
    """A site is run once for every distinct prefix, up to the end of its step, that keeps it."""
    counts = []
    for site in range(len(masks[0])):
        end = (site // width + 1) * width
        counts.append(len({mask.keep[:end] for mask in masks if mask.keep[site]}))
    return counts


@given(masks_of(), st.sampled_from([1, 2]))
def test_executions_are_those_of_distinct_prefixes(masks: list[Mask], width: int) -> None:
    assert executed_sites(masks, width) == brute_force(masks, width)


@given(masks_of())
def test_executions_depend_on_the_set_only(masks: list[Mask]) -> None:
    assert executed_sites(masks) == executed_sites(masks[::-1])
    assert executed_sites(masks) == executed_sites([*masks, *masks])


@given(masks_of(), st.sampled_from([1, 2]))
def test_every_mask_reaches_its_own_leaf_once(masks: list[Mask], width: int) -> None:
    """States are the sites run so far, so that a leaf shows exactly what led to it."""
    steps = steps_of(SITES, width)

    def advance(step: int, turn: Turn, state: tuple[int, ...]) -> tuple[int, ...]:
        assert any(turn.kept), "a step with everything dropped must not run"
        return (*state, *(s for s, k in zip(steps[step], turn.kept, strict=True) if k))

    leaves: dict[int, tuple[int, ...]] = {}

    def leaf(place: int, state: tuple[int, ...]) -> None:
        assert place not in leaves
        leaves[place] = state

    PrefixWalk(steps, advance).run(masks, (), leaf)
    assert leaves == {place: mask.kept for place, mask in enumerate(masks)}


def test_one_mask_and_equal_masks() -> None:
    mask = Mask.from_key("10110111")
    assert executed_sites([mask]) == [1, 0, 1, 1, 0, 1, 1, 1]
    seen: list[int] = []
    walk: PrefixWalk[int] = PrefixWalk(steps_of(SITES, 1), lambda *_: 0)
    walk.run([mask, mask, mask], 0, lambda place, _: seen.append(place))
    assert sorted(seen) == [0, 1, 2]
    assert walk.executed == [1, 0, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("width", [1, 2])
def test_steps_cover_the_sites_in_order(width: int) -> None:
    steps = steps_of(SITES, width)
    assert [site for step in steps for site in step] == list(range(SITES))
    assert {len(step) for step in steps} == {width}


def weighted(executed: list[int]) -> int:
    return sum(n * (FFN if site % 2 else ATTENTION) for site, n in enumerate(executed))


def saving(masks: list[Mask]) -> float:
    alone = sum(weighted(executed_sites([mask])) for mask in masks)
    return alone / weighted(executed_sites(masks))


def test_a_greedy_step_costs_about_half() -> None:
    """From the dense model, and from a mask of 60 sites that a few steps have thinned."""
    dense = Mask.dense(60)
    thinned = dense.without((7, 20, 21, 22, 38, 41, 55))
    for mask in (dense, thinned):
        step = [mask.without([site]) for site in mask.kept]
        assert saving(step) >= 1.9


def test_a_generation_of_offspring_costs_about_two_thirds() -> None:
    """32 offspring of one mask on 60 sites by one or two swaps of a dropped and a kept site."""
    parent = Mask.dense(60).without((7, 11, 20, 21, 22, 33, 38, 39, 41, 50, 51, 52, 53, 54, 55))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        children: dict[Mask, None] = {}
        while len(children) < 32:
            child = parent
            for _ in range(int(rng.integers(1, 3))):
                back, gone = rng.choice(child.dropped), rng.choice(child.kept)
                child = child.with_([int(back)]).without([int(gone)])
            children[child] = None
        assert saving(list(children)) >= 1.4
