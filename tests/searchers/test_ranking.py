"""Ranking keys from single removals."""

from __future__ import annotations

import pytest
from landscapes import SPACES

from depthsearch.searchers.ranking import loss_increases
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
