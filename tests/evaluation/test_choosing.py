from __future__ import annotations

from collections.abc import Mapping

import pytest

from depthsearch.evaluation.choosing import choose, target
from depthsearch.evaluation.cutting import Pool, Run
from depthsearch.space import Mask

SITES = 8
MASKS = [Mask.dropping(SITES, [site]) for site in range(SITES)]


def pool(*runs: Run) -> Pool:
    found = Pool()
    for run in runs:
        found.add(run)
    return found


def pick(
    runs: list[Run],
    wanted: int | None = None,
    seen: tuple[int, ...] = (),
    seers: Mapping[int, int] | None = None,
    second: float | None = None,
) -> Run | None:
    return choose(
        pool(*runs),
        wanted,
        seen,
        seers or {},
        allowed=lambda run: "me" not in run.tried,
        second=second,
    )


def test_the_order_of_preference() -> None:
    small, large = Run.of(0, MASKS[:2]), Run.of(1, MASKS)
    suspect, guess = Run.of(2, MASKS, ["other"]), Run.of(3, MASKS)
    assert pick([small, large]) is large
    assert pick([small, large], seen=(0,)) is small
    assert pick([suspect, small], seen=(2,)) is small
    assert pick([suspect]) is suspect
    assert pick([guess, large, small], wanted=0, seen=(1, 3)) is small
    assert pick([large, guess], wanted=9) is large


def test_who_failed_with_masks_does_not_get_them_again() -> None:
    mine, other = Run.of(0, MASKS, ["me"]), Run.of(1, MASKS[:1], ["other"])
    assert pick([mine]) is None
    assert pick([mine, other]) is other


def test_a_small_rest_is_left_to_those_who_recorded_its_batch() -> None:
    rest, whole = Run.of(0, MASKS[:1]), Run.of(1, MASKS)
    assert pick([rest], seers={0: 1}) is None
    assert pick([rest], seers={1: 1}) is rest
    assert pick([rest], seen=(0,), seers={0: 1}) is rest
    assert pick([whole], seers={1: 3}) is whole


def test_a_second_unit_is_whole_waited_for_and_small_enough() -> None:
    run = Run.of(0, MASKS)
    assert pick([run], second=run.cost - 1) is None
    assert pick([run], second=run.cost) is run
    assert pick([run], wanted=1, second=run.cost) is None


def test_units_are_a_part_of_the_share_until_two_masks_are_one() -> None:
    run = Run.of(0, MASKS)
    two = 2 * run.sheet.cost(0, 1)
    assert target(900, run) == pytest.approx(500)
    assert target(1.5 * two, run) == two
    assert target(two / 2, run) == two / 2
