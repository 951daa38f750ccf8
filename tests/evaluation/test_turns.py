"""What masks do at each step, and where their repairs are aimed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthsearch.evaluation.turns import Turn, fitted_site, steps_of, turns_of
from depthsearch.space import Mask

SITES = 8


def targets(key: str, repair: str, width: int = 1) -> list[int | None]:
    steps = steps_of(len(key), width)
    return [turn.target for turn in turns_of(Mask.from_key(key), steps, repair)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "gap", "sequential"),
    [
        ("11111111", [None] * 8, [None] * 8),
        ("11011111", [None, 3] + [None] * 6, [None, 3, None, 4, 5, 6, 7, 8]),
        ("11001101", [None, 4, None, None, None, 7, None, None],
                     [None, 4, None, None, 5, 7, None, 8]),
        ("00111111", [None, None, 3] + [None] * 5, [None, None, 3, 4, 5, 6, 7, 8]),
        ("11111100", [None] * 5 + [8, None, None], [None] * 5 + [8, None, None]),
        ("00000000", [None] * 8, [None] * 8),
    ],
)  # fmt: skip
def test_targets_of_sites(key: str, gap: list[int | None], sequential: list[int | None]) -> None:
    assert targets(key, "none") == [None] * 8
    assert targets(key, "gap") == gap
    assert targets(key, "sequential") == sequential


def test_a_block_that_runs_in_part_mends_itself() -> None:
    assert targets("11011111", "gap", width=2) == [None, 2, None, None]
    assert targets("11100011", "gap", width=2) == [None, 3, None, None]
    assert targets("11011111", "sequential", width=2) == [None, 2, 3, 4]


def test_the_last_site_that_runs_is_the_one_refitted() -> None:
    assert fitted_site((4, 5), Turn((True, True))) == 5
    assert fitted_site((4, 5), Turn((True, False))) == 4


@given(st.tuples(*[st.booleans()] * SITES).map(Mask), st.sampled_from([1, 2]))
def test_every_target_lies_ahead_and_every_gap_has_one(mask: Mask, width: int) -> None:
    steps = steps_of(SITES, width)
    gap, sequential = (turns_of(mask, steps, kind) for kind in ("gap", "sequential"))
    assert [turn.kept for turn in gap] == [turn.kept for turn in sequential]
    kept = [place for place, turn in enumerate(gap) if any(turn.kept)]
    for place, turn in enumerate(gap):
        for found in (turn, sequential[place]):
            assert found.target is None or (place in kept and found.target > place)
        if turn.target is not None:
            assert sequential[place] == turn
    for here, after in pairwise([*kept, len(steps)]):
        if after > here + 1 or not all(gap[here].kept):
            assert gap[here].target == after
