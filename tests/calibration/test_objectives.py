from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from tests.tiny_models import keeping, tiny_ids, tiny_model
from torch import Tensor

from depthsearch.calibration import objectives
from depthsearch.calibration.chrf import CHRF_KIND
from depthsearch.calibration.objectives import OBJECTIVES, CrossEntropy, KLDivergence
from depthsearch.config.searches import Loss
from depthsearch.model.anatomy import describe
from depthsearch.model.replay import Recording, Replayer
from depthsearch.model.switches import masked
from depthsearch.space import Mask

MASKS = tuple(
    keeping(pattern) for pattern in ("11 11 11 11", "11 01 11 11", "10 11 00 11", "00 00 00 01")
)
EVERY = [build() for build in OBJECTIVES.values()]
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


def test_the_angle_is_that_of_the_full_logits(case: Case) -> None:
    losses = case.losses(OBJECTIVES["angular"]())
    assert losses.shape == (len(MASKS), 27)
    assert losses.dtype == torch.float32
    teacher = case.at(case.exact[MASKS[0]])
    for row, mask in zip(losses[1:], MASKS[1:], strict=True):
        student = case.at(case.exact[mask])
        cosine = (teacher * student).sum(-1) / (teacher.norm(dim=-1) * student.norm(dim=-1))
        torch.testing.assert_close(row.double(), cosine.arccos() / math.pi, atol=1e-6, rtol=1e-5)
    assert losses[1:].mean() > 0.01, "the masks must differ from the dense model"


def test_the_norm_is_that_of_the_difference_of_the_full_logits(case: Case) -> None:
    losses = case.losses(OBJECTIVES["norm"]())
    teacher = case.at(case.exact[MASKS[0]])
    for row, mask in zip(losses[1:], MASKS[1:], strict=True):
        expected = (case.at(case.exact[mask]) - teacher).square().sum(-1).sqrt()
        torch.testing.assert_close(row.double(), expected, atol=1e-4, rtol=1e-5)


def test_the_jensen_shannon_divergence_is_the_entropy_gained_by_mixing(case: Case) -> None:
    """H((P + Q) / 2) - (H(P) + H(Q)) / 2, another form than the one computed."""

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p).sum(-1)

    losses = case.losses(OBJECTIVES["js"]())
    p = case.at(case.exact[MASKS[0]]).softmax(-1)
    for row, mask in zip(losses, MASKS, strict=True):
        q = case.at(case.exact[mask]).softmax(-1)
        expected = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
        torch.testing.assert_close(row.double(), expected, atol=1e-5, rtol=1e-4)
        assert 0 <= row.min() <= row.max() <= math.log(2) + 1e-6


def test_distances_in_a_case_worked_by_hand() -> None:
    """A vocabulary of two, where the hidden states are the logits."""
    dense, masked_ = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 9.9]])
    targets = torch.zeros(2, dtype=torch.long)

    def of(name: str) -> Tensor:
        return OBJECTIVES[name]().losses(lambda hidden: hidden, [masked_], dense, targets)[0]

    assert of("norm").tolist() == pytest.approx([5.0, 9.9])
    assert of("angular")[0].item() == pytest.approx(0.5)
    # One is sure of the first token, the other of the second: as far apart as can be is ln 2.
    sure = OBJECTIVES["js"]().losses(
        lambda hidden: 40 * hidden,
        [torch.tensor([[0.0, 1.0]])],
        torch.tensor([[1.0, 0.0]]),
        targets,
    )
    assert sure.item() == pytest.approx(math.log(2))
    # P is (1/2, 1/2), and Q as good as (0, 1): M is (1/4, 3/4).
    halves = 0.25 * math.log(2) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 3)
    assert of("js")[1].item() == pytest.approx(halves, abs=1e-3)


@pytest.mark.parametrize("name", ["angular", "norm", "js"])
def test_the_dense_model_is_at_no_distance_from_itself(case: Case, name: str) -> None:
    """Not even by the rounding of an arccos near one, which is some 1e-4."""
    logits, teacher = case.replayer.logits, case.teacher
    losses = OBJECTIVES[name]().losses(logits, [teacher], teacher, case.targets)
    assert losses.min() >= 0
    assert losses.max() < 1e-6


def test_a_small_angle_keeps_its_digits() -> None:
    dense, turned = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]])
    targets = torch.zeros(1, dtype=torch.long)
    found = OBJECTIVES["angular"]().losses(lambda hidden: hidden, [turned], dense, targets)
    assert found.item() == pytest.approx(1e-5 / math.pi, rel=1e-4)


@pytest.mark.parametrize("objective", EVERY, ids=lambda objective: objective.name)
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


@pytest.mark.parametrize("objective", EVERY, ids=lambda objective: objective.name)
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
    # What masks write is judged as a whole, not position by position.
    assert {*OBJECTIVES, CHRF_KIND} == set(get_args(Loss))
