"""Masks judged after repair: what is shared, what it costs, and that it is the repaired model."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from tests.evaluation.tiny_backends import assorted_masks, tiny_backend
from tests.tiny_models import keeping, tiny_ids, tiny_model

from depthsearch.calibration.objectives import OBJECTIVES
from depthsearch.errors import DataError, UnsupportedModelError
from depthsearch.evaluation import Refitted
from depthsearch.evaluation.fitting import FitText
from depthsearch.evaluation.refitting import RefitWalk
from depthsearch.evaluation.stepping import Stepper
from depthsearch.evaluation.turns import Repair, steps_of
from depthsearch.model.anatomy import describe
from depthsearch.model.families import FAMILIES
from depthsearch.model.operators import OPERATORS, RIDGES, token_weights
from depthsearch.model.repair import patched, projection_of
from depthsearch.model.replay import Mode
from depthsearch.space import Mask, Status

SITES = 8
FAMILIES_REPAIRED = list(FAMILIES)
KINDS: list[Repair] = ["gap", "sequential"]
FIT = tiny_ids(40, 12, seed=7)


def refitted(family: str = "llama", repair: Repair = "gap", **settings: Any) -> tuple[Any, Any]:
    judge = tiny_backend(model=tiny_model(family, **settings))
    return Refitted(judge, FIT, repair), judge


@pytest.mark.parametrize("repair", KINDS)
@pytest.mark.parametrize("family", FAMILIES_REPAIRED)
class TestEveryFamily:
    def test_losses_are_those_of_the_patched_model_bit_for_bit(
        self, family: str, repair: Repair
    ) -> None:
        backend, judge = refitted(family, repair)
        masks = assorted_masks(SITES)
        found = backend.run(0, masks)
        assert found.statuses == (Status.OK,) * len(masks)
        for mask, losses in zip(masks, found.losses, strict=True):
            patches = backend.repair(mask)
            with patched(judge.replayer.model, judge.replayer.anatomy, patches):
                plain = [judge.run(b, [mask]).losses[0] for b in range(len(judge.sequences))]
            assert losses == tuple(loss for batch in plain for loss in batch)

    def test_losses_and_cost_are_as_planned_whatever_the_company(
        self, family: str, repair: Repair
    ) -> None:
        backend, _ = refitted(family, repair)
        masks = assorted_masks(SITES)
        together = backend.run(0, masks)
        assert together.cost_tokens == backend.plan(masks) == backend.unit_cost(0, masks)
        alone = [backend.run(0, [mask]) for mask in masks]
        assert tuple(unit.losses[0] for unit in alone) == together.losses
        assert sum(unit.cost_tokens for unit in alone) > together.cost_tokens
        assert backend.run(0, masks[::-1]).losses == together.losses[::-1]


@pytest.mark.parametrize("name", ["cross_entropy", "angular", "norm", "js"])
@pytest.mark.parametrize("repair", KINDS)
def test_every_other_objective_is_that_of_the_patched_model(repair: Repair, name: str) -> None:
    judge = tiny_backend("llama", objective=OBJECTIVES[name]())
    backend = Refitted(judge, FIT, repair)
    masks = assorted_masks(SITES)
    for mask, losses in zip(masks, backend.run(0, masks).losses, strict=True):
        with patched(judge.replayer.model, judge.replayer.anatomy, backend.repair(mask)):
            plain = [judge.run(b, [mask]).losses[0] for b in range(len(judge.sequences))]
        assert losses == tuple(loss for batch in plain for loss in batch)


@pytest.mark.parametrize("repair", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "olmo2"])
def test_the_stream_comes_closer_to_the_dense_one(family: str, repair: Repair) -> None:
    backend, judge = refitted(family, repair)
    replayer = judge.replayer
    mask = keeping("11 11 00 11")
    ids = tiny_ids(20, 12, seed=7)
    recording = replayer.record(ids)
    cut = replayer.whole(recording, mask)
    patches = backend.repair(mask)
    assert patches[0].site == 3
    assert len(patches) <= (1 if repair == "gap" else 3)
    assert all(patch.left < 1 for patch in patches)
    with patched(replayer.model, replayer.anatomy, patches):
        mended = replayer.whole(recording, mask)
    weights = 1 / recording.last.square().mean(-1)
    error = [
        float((weights * (s - recording.last).square().mean(-1)).mean()) for s in (cut, mended)
    ]
    assert error[1] < 0.9 * error[0]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.norm_after])
def test_behind_a_norm_the_error_left_on_other_text_is_what_the_normal_equations_say(
    family: str, spread: bool
) -> None:
    model = tiny_model(family)
    norm = describe(model).block_list(model)[1].post_feedforward_layernorm
    if spread:
        sizes = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(0)).exp()
        norm.weight.copy_(sizes - (0 if family == "olmo2" else 1))
    claimed, left = error_left(model)
    assert left < 0.95
    assert left == pytest.approx(claimed, abs=0.03)


@pytest.mark.parametrize("factor", [0.22, 0.5])
def test_the_error_left_is_what_the_normal_equations_say_whatever_scales_the_output(
    factor: float,
) -> None:
    claimed, left = error_left(tiny_model("granite", residual_multiplier=factor))
    assert left < 0.97
    assert left == pytest.approx(claimed, abs=0.03)


def error_left(model: torch.nn.Module) -> tuple[float, float]:
    """The share of the error behind a gap that a repair claims to leave, and leaves, elsewhere."""
    judge = tiny_backend(model=model)
    replayer = judge.replayer
    patch = Refitted(judge, tiny_ids(200, 12, seed=7), "gap").repair(keeping("11 11 00 11"))[0]
    assert patch.site == 3
    assert patch.left is not None
    recording = replayer.record(tiny_ids(100, 12, seed=8))
    states = replayer.states(recording)
    weights = token_weights(states[4])

    def error() -> float:
        found = replayer.step(recording, 1, states[3], attention=False, ffn=True)
        return float((weights * (found - states[6]).square().sum(-1)).sum())

    cut = error()
    with patched(model, replayer.anatomy, [patch]):
        return patch.left, error() / cut


def test_the_dense_model_and_its_prefix_need_no_repair() -> None:
    backend, judge = refitted(repair="sequential")
    assert backend.repair(Mask.dense(SITES)) == ()
    patches = backend.repair(keeping("11 11 10 11"))
    assert {patch.site for patch in patches} <= {4, 6, 7}
    dense = backend.run(0, [Mask.dense(SITES)]).losses[0]
    assert dense == tuple(
        loss
        for b in range(len(judge.sequences))
        for loss in judge.run(b, [Mask.dense(SITES)]).losses[0]
    )


def test_the_model_is_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Refitted(tiny_backend(model=model), FIT, "sequential").run(0, assorted_masks(SITES))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gaps_that_end_elsewhere_share_one_gram_matrix_and_nothing_follows_the_last_gap() -> None:
    steps = steps_of(SITES, 1)
    walk = RefitWalk(steps, "gap", None, None)
    walk.run([keeping("11 10 11 11"), keeping("11 10 01 11")], (), lambda *_: None)
    assert walk.tally.normals == [0, 0, 1, 0, 0, 0, 0, 0]
    assert walk.tally.factors == [0, 0, len(RIDGES) + 2, 0, 0, 0, 0, 0]
    assert walk.tally.solves == [0, 0, 2, 0, 0, 0, 0, 0]
    assert walk.tally.fit == [0, 0, 1, 0, 0, 0, 0, 0]
    walk = RefitWalk(steps, "gap", None, None)
    walk.run([keeping("10 11 10 11")], (), lambda *_: None)
    assert walk.tally.fit == [2, 0, 1, 1, 1, 0, 0, 0]
    assert walk.tally.judged == [1, 0, 1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("repair", KINDS)
def test_the_pass_for_a_fit_counts_every_sublayer_that_it_runs(repair: Repair) -> None:
    backend, judge = refitted("cohere", repair)
    blocks = judge.replayer.anatomy.block_list(judge.replayer.model)
    run = [0] * SITES

    def counted(site: int) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...], further: dict[str, Any]) -> None:
            run[site] += (inputs[0] if inputs else further["hidden_states"]).shape[:2].numel()

        return hook

    for place, block in enumerate(blocks):
        for site, part in ((2 * place, block.self_attn), (2 * place + 1, block.mlp)):
            part.register_forward_pre_hook(counted(site), with_kwargs=True)
    mask = keeping("11 00 11 01")
    backend.run(0, [mask])  # Records the dense streams.
    before = list(run)
    walk = RefitWalk(steps_of(SITES, 2), repair, None, None)
    walk.run([mask], (), lambda *_: None)
    backend.run(0, [mask])
    judged = sum(judge.recording(b).ids.numel() for b in range(len(judge.sequences)))
    tally = walk.tally
    expected = [
        tally.fit[site] * FIT.numel() + tally.judged[site] * judged for site in range(SITES)
    ]
    assert [after - b for after, b in zip(run, before, strict=True)] == expected


def test_a_repair_is_dearer_than_none_by_what_it_fits() -> None:
    backend, judge = refitted()
    mask = keeping("11 10 01 11")
    assert backend.plan([mask]) > judge.plan([mask])
    assert backend.preparation > judge.preparation
    assert backend.plan([]) == 0
    assert backend.sequences == (sum(judge.sequences),)


@pytest.mark.parametrize("operator", list(OPERATORS))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_operator_is_judged_at_the_planned_cost(family: str, operator: str) -> None:
    judge = tiny_backend(model=tiny_model(family))
    backend = Refitted(judge, FIT, "gap", operator=operator)
    masks = [keeping("11 10 01 11"), keeping("11 10 11 11"), keeping("11 00 11 11")]
    unit = backend.run(0, masks)
    assert unit.cost_tokens == backend.plan(masks)
    assert unit.losses[::-1] == backend.run(0, masks[::-1]).losses
    same = operator in ("refit", "low_rank")  # At this size the rank is no limit.
    assert (unit.cost_tokens == Refitted(judge, FIT, "gap").plan(masks)) == same


def test_a_fit_that_cannot_be_solved_is_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend, judge = refitted()
    blocks = judge.replayer.anatomy.block_list(judge.replayer.model)
    for block in blocks:
        block.mlp.up_proj.weight.zero_()
    assert backend.repair(keeping("11 11 00 11")) == ()
    assert backend.repair(keeping("11 00 11 11")) == ()
    assert backend.ill_conditioned == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "decoder.1.ffn can't be refitted" in caplog.text


def test_bfloat16_patches_have_the_models_dtype() -> None:
    backend, judge = refitted(dtype=torch.bfloat16)
    (patch,) = backend.repair(keeping("11 11 00 11"))
    site = judge.replayer.anatomy.sites[patch.site]
    assert patch.weight.dtype == torch.bfloat16
    weight = projection_of(judge.replayer.model, judge.replayer.anatomy, site).weight
    assert not torch.equal(patch.weight, weight)


def test_what_cannot_be_repaired_is_refused() -> None:
    whole = tiny_backend(model=tiny_model("llama"), mode=Mode.WHOLE)
    with pytest.raises(UnsupportedModelError, match=r"repair.* none"):
        Refitted(whole, FIT, "gap")
    with pytest.raises(DataError, match=r"calibration\.fit_tokens"):
        Refitted(tiny_backend(model=tiny_model("llama")), FIT[:3], "gap")


@pytest.mark.parametrize("repair", KINDS)
@pytest.mark.parametrize("blocks", [4, 12])
def test_states_of_the_judged_text_go_once_it_has_moved_on(blocks: int, repair: Repair) -> None:
    """Behind the last gap too, where the fit text stays where it was."""
    judge = tiny_backend(model=tiny_model("llama", blocks))
    recording = judge.recording(0)
    stepper = Stepper(judge.replayer, Mode.SITE)
    seen: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    class Watched(Stepper):
        def run(self, *arguments: Any) -> torch.Tensor:
            hidden = super().run(*arguments)
            seen.append(weakref.ref(hidden))
            return hidden

    walk = RefitWalk(
        stepper.steps, repair, Watched(judge.replayer, Mode.SITE), FitText(stepper, FIT, 128)
    )
    walk.run(
        [Mask.dropping(2 * blocks, [2, 3])],
        ((recording.calls, recording.first),),
        lambda *_: left.append(sum(state() is not None for state in seen)),
    )
    assert len(seen) == 2 * blocks - 2
    assert left == [1]
