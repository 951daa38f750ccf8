from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from tests.evaluation.tiny_backends import assorted_masks, tiny_backend
from tests.tiny_models import tiny_model

from depthsearch.evaluation import Racing, UnitResult, evaluate
from depthsearch.evaluation.elimination import MIN_SEQUENCES
from depthsearch.space import Evaluation, Hints, Mask, Stage, Status

BATCHES, ROWS, TOKENS = 8, 2, 16
SEQUENCES = BATCHES * ROWS


@dataclass
class Table:
    """A backend that reads losses `[mask, sequence]` from a table; one token costs one."""

    losses: dict[Mask, np.ndarray]
    failing: dict[tuple[Mask, int], Status] = field(default_factory=dict)
    asked: list[tuple[int, tuple[Mask, ...]]] = field(default_factory=list)

    @property
    def sequences(self) -> tuple[int, ...]:
        return (ROWS,) * BATCHES

    @property
    def window_tokens(self) -> int:
        return TOKENS

    @property
    def preparation(self) -> float:
        return 0.0

    def run(
        self, batch: int, masks: Sequence[Mask], ahead: Sequence[int] = (), *, sure: bool = True
    ) -> UnitResult:
        self.asked.append((batch, tuple(masks)))
        statuses = tuple(self.failing.get((mask, batch), Status.OK) for mask in masks)
        rows = slice(batch * ROWS, (batch + 1) * ROWS)
        return UnitResult(
            tuple(
                tuple(self.losses[mask][rows].tolist()) if status is Status.OK else ()
                for mask, status in zip(masks, statuses, strict=True)
            ),
            statuses,
            float(ROWS * TOKENS * len(masks)),
        )

    def plan(self, masks: Sequence[Mask]) -> float:
        return float(SEQUENCES * TOKENS * len(masks))

    def once(self, masks: Sequence[Mask]) -> float:
        return 0.0

    def prepare(self, masks: Sequence[Mask]) -> float:
        return 0.0

    def hints(self) -> tuple[Hints, float]:
        raise AssertionError("a race needs no hints")


def names(count: int) -> list[Mask]:
    return [Mask.from_key(format(i, "06b")) for i in range(1, count + 1)]


def table(means: Sequence[float], own: float, shared: float = 1.0, seed: int = 0) -> Table:
    """Masks with these means, noise of each pair of mask and sequence, and noise all share."""
    rng = np.random.default_rng(seed)
    common = rng.normal(0, shared, SEQUENCES)
    return Table(
        {
            mask: mean + common + rng.normal(0, own, SEQUENCES)
            for mask, mean in zip(names(len(means)), means, strict=True)
        }
    )


def complete(found: Sequence[Evaluation]) -> list[Mask]:
    return [e.mask for e in found if e.status is Status.OK]


def test_without_a_race_everything_is_evaluated() -> None:
    backend = table(np.linspace(0, 50, 12).tolist(), 0.01)
    masks = names(12)
    found, cost = evaluate(backend, masks)
    assert [e.mask for e in found] == masks
    for evaluation in found:
        assert evaluation.status is Status.OK
        assert evaluation.losses == tuple(backend.losses[evaluation.mask].tolist())
        assert evaluation.tokens == SEQUENCES * TOKENS
    assert cost == backend.plan(masks)


@pytest.mark.parametrize("survivors", [1, 3])
def test_clear_differences_leave_exactly_the_survivors(survivors: int) -> None:
    """Noise that all masks share is a hundred times larger than the differences."""
    order = np.random.default_rng(1).permutation(12)
    backend = table((0.05 * order).tolist(), 0.005, shared=5.0)
    found, cost = evaluate(backend, names(12), survivors=survivors)
    best = [mask for _, mask in sorted(zip(order.tolist(), names(12), strict=True))][:survivors]
    assert set(complete(found)) == set(best)
    assert cost < 0.5 * backend.plan(names(12))
    for evaluation in found:
        if evaluation.mask not in best:
            assert evaluation.status is Status.ELIMINATED
            seen = len(evaluation.losses)
            assert MIN_SEQUENCES <= seen < SEQUENCES
            assert seen % ROWS == 0
            assert evaluation.losses == tuple(backend.losses[evaluation.mask][:seen].tolist())
            assert evaluation.tokens == seen * TOKENS
    assert cost == sum(evaluation.tokens for evaluation in found)


def test_differences_within_the_noise_eliminate_nobody() -> None:
    """Equal masks: less than one in twenty is lost by chance."""
    lost = total = 0
    for seed in range(40):
        backend = table([0.0] * 10, 1.0, seed=seed)
        found, _ = evaluate(backend, names(10), survivors=4)
        lost += sum(e.status is Status.ELIMINATED for e in found)
        total += len(found)
    assert lost / total < 0.05


def test_the_best_mask_is_almost_never_lost() -> None:
    """Ten masks half a standard deviation apart, on 200 tables."""
    lost = 0
    for seed in range(200):
        backend = table((0.5 * np.arange(10)).tolist(), 1.0, seed=seed)
        averages = {mask: float(np.mean(x)) for mask, x in backend.losses.items()}
        winner = min(averages, key=averages.__getitem__)
        found, _ = evaluate(backend, names(10), survivors=1)
        lost += winner not in complete(found)
    assert lost <= 200 * 0.03


def test_nobody_is_judged_on_fewer_sequences_than_the_minimum() -> None:
    backend = table([0.0, 100.0], 0.001)
    found, _ = evaluate(backend, names(2), survivors=1)
    assert len(found[1].losses) == MIN_SEQUENCES


def test_nobody_is_eliminated_after_the_last_batch() -> None:
    """A mask that has been seen everywhere is complete, however bad it is."""
    late = table([0.0, 0.0], 0.0, shared=0.0)
    late.losses[names(2)[1]][-ROWS:] = 1000.0
    found, _ = evaluate(late, names(2), survivors=1)
    assert [e.status for e in found] == [Status.OK, Status.OK]


def rival(mask: Mask, losses: Sequence[float], status: Status = Status.OK) -> Evaluation:
    return Evaluation(mask, tuple(losses), len(losses) * TOKENS, status)


class TestRivals:
    far = Mask.from_key("111111")

    def race(self, rivals: Sequence[Evaluation], survivors: int = 1) -> list[Mask]:
        backend = table([0.0, 0.2, 0.4], 0.01)
        self.backend = backend
        return complete(evaluate(backend, names(3), survivors=survivors, rivals=rivals)[0])

    def test_better_rivals_take_the_places(self) -> None:
        common = table([0.0], 0.0).losses[names(1)[0]]
        better = [rival(Mask.from_key(k), (common - 1).tolist()) for k in ("111111", "111110")]
        assert self.race(better[:1]) == []
        assert self.race(better[:1], survivors=2) == names(1)
        assert self.race(better, survivors=2) == []

    def test_worse_rivals_change_nothing(self) -> None:
        common = table([0.0], 0.0).losses[names(1)[0]]
        assert self.race([rival(self.far, (common + 9).tolist())]) == names(1)
        assert self.race([]) == names(1)

    @pytest.mark.parametrize("status", [Status.ELIMINATED, Status.NON_FINITE, Status.FAILED])
    def test_rivals_that_are_not_complete_do_not_count(self, status: Status) -> None:
        losses = (-100.0,) * (4 if status.has_loss else 0)
        assert self.race([rival(self.far, losses, status)]) == names(1)


def test_a_failure_ends_a_mask_and_frees_its_place() -> None:
    first = names(1)[0]
    backend = table([0.0, 0.2, 0.4], 0.01)
    backend.failing = {(first, 1): Status.NON_FINITE}
    found, cost = evaluate(backend, names(3), survivors=1)
    assert [e.status for e in found] == [Status.NON_FINITE, Status.OK, Status.ELIMINATED]
    assert (found[0].losses, found[0].tokens, found[0].loss) == ((), 0, None)
    assert all(first not in masks for batch, masks in backend.asked if batch > 1)
    assert cost == sum(ROWS * TOKENS * len(masks) for _, masks in backend.asked)


def test_when_everything_fails_nothing_more_is_computed() -> None:
    backend = table([0.0, 0.1], 0.0)
    backend.failing = {(mask, 0): Status.OUT_OF_MEMORY for mask in names(2)}
    found, _ = evaluate(backend, names(2), survivors=1)
    assert [e.status for e in found] == [Status.OUT_OF_MEMORY] * 2
    assert len(backend.asked) == 1
    assert evaluate(backend, [])[0] == []


def test_units_are_reported_as_they_are_done() -> None:
    backend = table([0.0, 0.1], 0.01)
    calls: list[tuple[int, int, float]] = []
    _, cost = evaluate(backend, names(2), on_unit=lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(i + 1, 8) for i in range(8)]
    assert [spent for _, _, spent in calls] == sorted(spent for _, _, spent in calls)
    assert calls[-1][2] == cost


@pytest.mark.parametrize("seed", range(4))
def test_on_a_real_model_the_race_finds_the_winner_of_the_whole_field(seed: int) -> None:
    settings: dict[str, Any] = {"rows": 16, "tokens": 12, "batch_tokens": 24, "seed": seed}
    backend = tiny_backend(model=tiny_model("llama", seed=seed), **settings)
    masks = [mask for mask in assorted_masks(8, seed, count=24) if mask.dropped]
    full, whole = evaluate(backend, masks)
    raced, cost = evaluate(backend, masks, survivors=1)
    winner = min(full, key=lambda e: e.order)
    assert min(raced, key=lambda e: e.order) == winner
    assert cost < whole
    for a, b in zip(full, raced, strict=True):
        assert b.losses == a.losses[: len(b.losses)]
        assert (b.status is Status.OK) == (len(b.losses) == len(a.losses))
    best = sorted(full, key=lambda e: e.order)[:4]
    raced, _ = evaluate(backend, masks, survivors=4)
    assert sorted(raced, key=lambda e: e.order)[:4] == best


def test_stages_keep_the_best_so_far_whatever_they_differ_by() -> None:
    """The mask that is best on all text, but not on its beginning, is lost, as it must be."""
    backend = table([0.0] * 6, 0.001, shared=1.0)
    masks = names(6)
    late = masks[3]
    backend.losses[late][: 4 * ROWS] += 1.0
    backend.losses[late][4 * ROWS :] -= 10.0
    found, cost = evaluate(backend, masks, stages=(Stage(0.25, 4), Stage(0.5, 2)))
    firsts = {mask: losses[: 2 * ROWS].mean() for mask, losses in backend.losses.items()}
    after_one = sorted(masks, key=lambda m: firsts[m])[:4]
    halves = {mask: losses[: 4 * ROWS].mean() for mask, losses in backend.losses.items()}
    after_two = sorted(after_one, key=lambda m: halves[m])[:2]
    assert late not in after_two
    assert set(complete(found)) == set(after_two)
    assert sorted(len(e.losses) for e in found) == [4, 4, 8, 8, 16, 16]
    assert cost == sum(e.tokens for e in found)
    assert [len(asked) for _, asked in backend.asked] == [6, 6, 4, 4, 2, 2, 2, 2]


def test_a_stage_at_the_end_cuts_nobody_short() -> None:
    backend = table([0.0, 1.0, 2.0], 0.1)
    found, _ = evaluate(backend, names(3), stages=(Stage(1.0, 1),))
    assert all(e.status is Status.OK for e in found)


def test_a_safe_mask_goes_on_in_the_place_of_a_better_one() -> None:
    backend = table([0.0, 1.0, 2.0, 3.0, 4.0], 0.01)
    masks = names(5)
    found, _ = evaluate(backend, masks, stages=(Stage(0.25, 2),), safe=masks[4:])
    assert complete(found) == [masks[0], masks[4]]
    found, _ = evaluate(backend, masks, stages=(Stage(0.25, 1),), safe=masks[3:])
    assert complete(found) == masks[3:]


def test_failures_are_no_survivors_of_a_stage() -> None:
    backend = table([0.0, 1.0, 2.0], 0.01)
    first, second, third = names(3)
    backend.failing[first, 0] = Status.NON_FINITE
    found, _ = evaluate(backend, names(3), stages=(Stage(0.125, 1),))
    assert [e.status for e in found] == [Status.NON_FINITE, Status.OK, Status.ELIMINATED]
    assert complete(found) == [second]
    assert third not in complete(found)


def test_the_error_rate_is_that_of_the_race() -> None:
    """A smaller one stops the same masks later, and some not at all."""
    means = (0.4 * np.arange(12)).tolist()
    seen = {}
    for rate in (0.5, 0.05, 0.0005):
        found, _ = evaluate(table(means, 1.0, seed=3), names(12), survivors=2, error_rate=rate)
        seen[rate] = [len(e.losses) for e in found]
    assert sum(seen[0.5]) < sum(seen[0.05]) < sum(seen[0.0005])
    for strict, loose in zip(seen[0.0005], seen[0.5], strict=True):
        assert strict >= loose


class TestHalving:
    halving = Racing("halving")

    def test_rungs_double_the_text_and_halve_the_masks(self) -> None:
        """16 sequences are too few for the fourth halving, which 16 masks would have."""
        assert self.halving.stages(16, 1, (4,) * 4) == (Stage(0.25, 8), Stage(0.5, 4))
        assert self.halving.stages(16, 1, (4,) * 16) == (
            Stage(1 / 16, 8), Stage(1 / 8, 4), Stage(1 / 4, 2), Stage(1 / 2, 1),
        )  # fmt: skip
        assert Racing("halving", eta=3).stages(20, 2, (3,) * 21) == (
            Stage(1 / 9, 7), Stage(1 / 3, 3),
        )  # fmt: skip

    def test_never_fewer_than_the_survivors(self) -> None:
        assert self.halving.stages(16, 5, (4,) * 16) == (Stage(1 / 4, 8), Stage(1 / 2, 5))
        assert self.halving.stages(5, 5, (4,) * 16) == ()
        assert self.halving.stages(3, 5, (4,) * 16) == ()

    def test_no_rung_before_a_batch_or_the_fewest_sequences(self) -> None:
        assert self.halving.stages(16, 1, (8, 8, 8)) == (Stage(0.5, 8),)
        assert self.halving.stages(16, 1, (1,) * 8) == (Stage(0.5, 8),)
        assert self.halving.stages(16, 1, (32,)) == ()

    def test_nothing_where_all_must_be_known_or_a_race_is_paired(self) -> None:
        assert self.halving.stages(16, None, (4,) * 16) == ()
        assert Racing().stages(16, 1, (4,) * 16) == ()

    def test_a_race_of_rungs_judges_as_many_as_they_say(self) -> None:
        backend = table((0.5 * np.arange(8)).tolist(), 0.01)
        stages = self.halving.stages(8, 2, backend.sequences)
        assert stages == (Stage(0.25, 4), Stage(0.5, 2))
        found, cost = evaluate(backend, names(8), stages=stages)
        assert [len(e.losses) for e in found] == [16, 16, 8, 8, 4, 4, 4, 4]
        assert cost == sum(e.tokens for e in found) == TOKENS * 64
