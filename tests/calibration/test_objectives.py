from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.tiny_models import keeping, tiny_ids, tiny_model
from torch import Tensor

from depthsearch.calibration import objectives
from depthsearch.calibration.objectives import OBJECTIVES, CrossEntropy, KLDivergence
from depthsearch.model.anatomy import describe
from depthsearch.model.replay import Recording, Replayer
from depthsearch.model.switches import masked
from depthsearch.space import Mask

MASKS = tuple(
    keeping(pattern) for pattern in ("11 11 11 11", "11 01 11 11", "10 11 00 11", "00 00 00 01")
)
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 2.0},
}


@dataclass
class Case:
    """One tiny model, hidden states of its masks at some positions, and exact logits there."""

    replayer: Replayer
    recording: Recording
    exact: dict[Mask, Tensor]
    positions: Tensor

    @property
    def targets(self) -> Tensor:
        return self.recording.ids.gather(1, self.positions + 1).flatten()

    def at(self, states: Tensor) -> Tensor:
        return torch.cat([row[where] for row, where in zip(states, self.positions, strict=True)])

    @property
    def students(self) -> list[Tensor]:
        return [self.at(self.replayer.whole(self.recording, mask)) for mask in MASKS]

    @property
    def teacher(self) -> Tensor:
        return self.at(self.recording.last)

    def losses(self, objective: Any) -> Tensor:
        return objective.losses(self.replayer.logits, self.students, self.teacher, self.targets)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    family = request.param
    model = tiny_model(family, **FAMILIES[family])
    anatomy = describe(model)
    ids = tiny_ids(3, 24)
    replayer = Replayer(model, anatomy)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(23, generator=generator)[:9].sort().values for _ in range(3)]
    positions = torch.stack(rows)
    double = tiny_model(family, **FAMILIES[family]).double()
    exact = {}
    for mask in MASKS:
        with torch.no_grad(), masked(double, anatomy, mask):
            logits = double(input_ids=ids, use_cache=False).logits
        assert logits.dtype == torch.float64
        exact[mask] = logits
    return Case(replayer, replayer.record(ids), exact, positions)


def test_kl_equals_the_plain_one_over_full_logits(case: Case) -> None:
    losses = case.losses(KLDivergence())
    assert losses.shape == (len(MASKS), 27)
    assert losses.dtype == torch.float32
    teacher = case.at(case.exact[MASKS[0]]).log_softmax(-1)
    for row, mask in zip(losses, MASKS, strict=True):
        student = case.at(case.exact[mask]).log_softmax(-1)
        expected = (teacher.exp() * (teacher - student)).sum(-1)
        torch.testing.assert_close(row.double(), expected, atol=2e-5, rtol=1e-4)
    assert losses[1:].mean() > 0.01, "the masks must differ from the dense model"


def test_cross_entropy_equals_the_plain_one_over_full_logits(case: Case) -> None:
    losses = case.losses(CrossEntropy())
    assert losses.shape == (len(MASKS), 27)
    for row, mask in zip(losses, MASKS, strict=True):
        expected = torch.nn.functional.cross_entropy(
            case.at(case.exact[mask]), case.targets, reduction="none"
        )
        torch.testing.assert_close(row.double(), expected, atol=2e-5, rtol=1e-4)


def test_cross_entropy_is_of_the_next_token(case: Case) -> None:
    """Against the model's own shifted loss over all positions."""
    ids = case.recording.ids
    everywhere = Case(case.replayer, case.recording, {}, torch.arange(23).expand(3, 23))
    with torch.no_grad():
        own = case.replayer.model(input_ids=ids, labels=ids, use_cache=False).loss
    assert float(everywhere.losses(CrossEntropy())[0].mean()) == pytest.approx(float(own), rel=1e-5)


def test_kl_of_the_dense_model_to_itself_vanishes(case: Case) -> None:
    assert float(case.losses(KLDivergence())[0].abs().max()) < 1e-5


@pytest.mark.parametrize("objective", [KLDivergence(), CrossEntropy()])
@pytest.mark.parametrize("chunk", [1, 7, 26, 27])
def test_the_chunk_size_changes_nothing(
    case: Case, objective: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = case.losses(objective)
    monkeypatch.setattr(objectives, "CHUNK_POSITIONS", chunk)
    chunked = case.losses(objective)
    torch.testing.assert_close(chunked.mean(-1), whole.mean(-1), atol=1e-6, rtol=1e-6)
    # One position carries the rounding of logits around 10 in float32.
    torch.testing.assert_close(chunked, whole, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("objective", [KLDivergence(), CrossEntropy()])
def test_logits_are_formed_for_one_chunk_at_a_time(
    case: Case, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "CHUNK_POSITIONS", 10)
    asked: list[int] = []

    def logits(hidden: Tensor) -> Tensor:
        asked.append(len(hidden))
        return case.replayer.logits(hidden)

    objective.losses(logits, case.students, case.teacher, case.targets)
    times = len(MASKS) + objective.needs_teacher
    assert sorted(asked) == sorted([10, 10, 7] * times)


def test_losses_in_bfloat16_are_formed_in_float32(case: Case) -> None:
    """Rounding the logits is the model's own; nothing more is lost after them."""

    def logits(hidden: Tensor) -> Tensor:
        return case.replayer.logits(hidden).bfloat16()

    losses = KLDivergence().losses(logits, case.students, case.teacher, case.targets)
    teacher = logits(case.teacher).double().log_softmax(-1)
    for row, states in zip(losses, case.students, strict=True):
        expected = (teacher.exp() * (teacher - logits(states).double().log_softmax(-1))).sum(-1)
        torch.testing.assert_close(row.double(), expected, atol=2e-5, rtol=1e-4)


def test_every_objective_is_listed_by_its_name() -> None:
    assert {name: build().name for name, build in OBJECTIVES.items()} == {
        name: name for name in OBJECTIVES
    }
    assert set(OBJECTIVES) == {"kl", "cross_entropy"}
