from __future__ import annotations

import numpy as np
import pytest

from depthsearch.evaluation.feeding import Ask, best_total, efficiency, workers_fed
from depthsearch.space import Mask

SITES = 40


def offspring(count: int, seed: int = 0) -> Ask:
    """Swaps of a mask without a quarter of its sites."""
    rng = np.random.default_rng(seed)
    parent = Mask.dropping(SITES, range(0, SITES, 4))
    found: dict[Mask, None] = {}
    while len(found) < count:
        back, gone = (int(rng.choice(part)) for part in (parent.dropped, parent.kept))
        found[parent.with_([back]).without([gone])] = None
    return Ask(tuple(found))


ASKS = [offspring(32, seed) for seed in range(3)]


def test_one_worker_is_always_busy_and_shares_everything() -> None:
    found = efficiency(ASKS, 16, 1)
    assert (found.busy, found.sharing) == pytest.approx((1, 1))


def test_shares_multiply_to_the_speed_up() -> None:
    one, many = (efficiency(ASKS, 16, n, spread=0.0) for n in (1, 12))
    assert many.total == pytest.approx(many.busy * many.sharing)
    assert one.total == pytest.approx(1)
    assert 0.5 < many.sharing < 1
    assert many.total <= best_total(ASKS, 16, 12) <= 1


def test_two_masks_cannot_feed_three_workers() -> None:
    apart = Ask((Mask.dropping(SITES, [0]), Mask.dense(SITES)))
    assert best_total([apart], 1, 3) < 0.75
    assert efficiency([apart], 1, 3).busy < 0.68


def test_workers_stay_busy_while_there_are_many_batches_for_each() -> None:
    # Of 32 offspring on 64 batches each of 16 workers has four batches' worth.
    found = efficiency(ASKS, 64, 16)
    assert found.busy >= 0.95
    assert found.total >= 0.9


def test_many_workers_are_fed_by_many_masks_and_batches() -> None:
    found = efficiency([offspring(32)] * 2, 512, 256)
    assert found.busy >= 0.92
    assert found.total >= 0.85


def test_fed_is_the_largest_number_that_reaches_the_bar() -> None:
    fed = workers_fed(ASKS, 32, (1, 8, 64, 512))
    figures = {found.workers: found for found in fed.tried}
    assert figures[fed.busy].busy >= 0.95
    assert figures[fed.total].total >= 0.8
    assert fed.busy < 512
    assert fed.total < 512
    above = min(n for n in figures if n > fed.total)
    assert figures[above].total < 0.8


def test_a_race_feeds_fewer_workers_than_the_same_masks_to_the_end() -> None:
    ask = ASKS[0]
    lasts = tuple(4 if place > 3 else 99 for place in range(len(ask.masks)))
    raced = Ask(ask.masks, lasts)
    assert len(raced.on(3)) == 32
    assert len(raced.on(4)) == 4
    assert efficiency([raced], 32, 32).total < efficiency([ask], 32, 32).total


def test_batches_that_no_ask_reaches_count_for_nobody() -> None:
    ask = ASKS[0]
    raced = Ask(ask.masks, (1,) * len(ask.masks))
    assert efficiency([raced], 8, 1) == efficiency([raced], 1, 1)
    assert efficiency([raced], 8, 4).sharing <= 1


def test_each_ask_is_followed_for_each_number_of_workers() -> None:
    seen: list[None] = []
    workers_fed(ASKS, 2, (1, 2, 4, 8), on_ask=lambda: seen.append(None))
    assert len(seen) == 4 * len(ASKS)
