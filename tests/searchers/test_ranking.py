"""Ranking keys from single removals."""

from __future__ import annotations

import pytest
from landscapes import SPACES

from depthsearch.searchers.ranking import increases_from, loss_increases
from depthsearch.space import Evaluation, Mask, Status


def test_a_sweep_loser_is_compared_on_the_sequences_it_saw() -> None:
    space = SPACES["sublayer"]
    sites = len(space.sites)
    dense = Evaluation(space.dense, (1.0, 1.0, 3.0, 3.0), 4)
    lost = Evaluation(Mask.dropping(sites, [3]), (1.5, 1.5), 2, Status.ELIMINATED)
    kept = Evaluation(Mask.dropping(sites, [4]), (1.1, 1.1, 3.1, 3.1), 4)
    assert loss_increases(space, [dense, lost, kept], dense) == pytest.approx(
        {(3,): 0.5, (4,): 0.1}
    )


# The second half of the text is harder, by 3 for every mask alike.
SURVIVOR = Evaluation(Mask.dropping(12, [3]), (0.9, 0.9, 3.9, 3.9), 4)
OTHER = Evaluation(Mask.dropping(12, [4]), (0.9, 0.9, 4.1, 4.1), 4)
LOST = Evaluation(Mask.dropping(12, [5]), (1.3, 1.3), 2, Status.ELIMINATED)
SWEEP = (LOST, SURVIVOR, OTHER)


def test_a_dense_model_that_lost_the_race_makes_no_survivor_look_bad() -> None:
    space = SPACES["sublayer"]
    dense = Evaluation(space.dense, (1.0, 1.0), 2, Status.ELIMINATED)
    found = loss_increases(space, (dense, *SWEEP), dense)
    assert sorted(found, key=found.__getitem__) == [(3,), (4,), (5,)]
    # All of the text tells survivors apart; what lost is compared on the text it saw.
    assert found[4,] - found[3,] == pytest.approx(0.1)
    assert found[5,] - found[3,] == pytest.approx(0.4)
    # Where none has seen more, all are compared on what they share.
    assert loss_increases(space, [LOST], dense) == pytest.approx({(5,): 0.3})


@pytest.mark.parametrize("status", [None, Status.NON_FINITE])
def test_without_a_dense_loss_all_increases_are_off_by_one_constant(status: Status | None) -> None:
    space = SPACES["sublayer"]
    dense = None if status is None else Evaluation(space.dense, (), 0, status)
    found = loss_increases(space, SWEEP, dense)
    assert {unit: loss - found[3,] for unit, loss in found.items()} == pytest.approx(
        {(3,): 0.0, (4,): 0.1, (5,): 0.4}
    )
    assert loss_increases(space, (), dense) == {}


def test_increases_from_a_complete_mask_are_paired_by_sequence() -> None:
    known = Evaluation(Mask.dense(12), (0.8, 1.0, 4.0, 4.0), 4)
    assert increases_from(known.mask, SWEEP, known) == pytest.approx(
        {(3,): -0.05, (4,): 0.05, (5,): 0.4}
    )
