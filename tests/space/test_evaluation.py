"""Evaluations: losses, order, and what survives JSON."""

from __future__ import annotations

import json
import math

import pytest

from depthsearch.space import Evaluation, Hints, Mask, Proposal, Status

MASK = Mask.from_key("1101")


def test_loss_and_standard_error_come_from_the_sequences() -> None:
    evaluation = Evaluation(MASK, (1.0, 2.0, 6.0), 96)
    assert evaluation.loss == 3.0
    assert evaluation.stderr == pytest.approx(math.sqrt(7 / 3))
    assert Evaluation(MASK, (1.5,), 32).stderr is None


@pytest.mark.parametrize("status", [s for s in Status if not s.has_loss])
def test_a_failure_has_no_loss(status: Status) -> None:
    evaluation = Evaluation(MASK, (), 0, status)
    assert evaluation.loss is None
    assert evaluation.stderr is None
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation


def test_order_puts_complete_before_eliminated_before_failed() -> None:
    other = Mask.from_key("0111")
    failed = Evaluation(MASK, (), 0, Status.TIMED_OUT)
    lost = Evaluation(MASK, (0.1,), 8, Status.ELIMINATED)
    poor, good = Evaluation(MASK, (3.0, 3.0), 16), Evaluation(MASK, (1.0, 2.0), 16)
    tied = Evaluation(other, (1.5, 1.5), 16)
    ranked = sorted([failed, lost, poor, good, tied], key=lambda e: e.order)
    assert ranked == [tied, good, poor, lost, failed]


def test_json_round_trips() -> None:
    evaluation = Evaluation(MASK, (0.1, 0.7), 64, Status.ELIMINATED)
    assert Evaluation.from_json(json.loads(json.dumps(evaluation.to_json()))) == evaluation
    proposal = Proposal(MASK, "greedy step 3", final=False)
    assert Proposal.from_json(json.loads(json.dumps(proposal.to_json()))) == proposal


def test_hints_measure_influence_across_a_run_of_sites() -> None:
    cosine = ((1.0, 0.9, 0.7), (0.9, 1.0, 0.8), (0.7, 0.8, 1.0))
    hints = Hints(cosine, cosine)
    assert hints.influence([0]) == pytest.approx(0.1)
    assert hints.influence([1, 0]) == pytest.approx(0.3)
    assert Hints.from_json(json.loads(json.dumps(hints.to_json()))) == hints
