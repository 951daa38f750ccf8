"""Masks of encoder-decoders: losses are those of plain forward passes, and repairs mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.evaluation.tiny_backends import assorted_masks
from tests.tiny_models import ENCODER_DECODER_TYPES, paired_ids, tiny_model

from depthsearch.calibration.objectives import CrossEntropy, KLDivergence, Objective
from depthsearch.errors import DataError, UnsupportedModelError
from depthsearch.evaluation import InProcess, Refitted
from depthsearch.evaluation.decoding import translate_greedily
from depthsearch.evaluation.samples import draw_samples
from depthsearch.evaluation.turns import Repair, steps_of, turns_of
from depthsearch.model.anatomy import describe
from depthsearch.model.families import ENCODER_DECODERS
from depthsearch.model.repair import patched
from depthsearch.model.replay import Mode
from depthsearch.model.switches import masked
from depthsearch.space import Mask, Status, mask_from_names

SITES, TOKENS = 17, 12
MENDED = [name for name, family in ENCODER_DECODERS.items() if not family.decoder.post_norm]
EVERY = pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
FIT = paired_ids(60, TOKENS, seed=7)


def backend(model_type: str, **changes: Any) -> InProcess:
    model = tiny_model(model_type) if "model" not in changes else changes.pop("model")
    settings: dict[str, Any] = {"mode": Mode.SITE, "batch_tokens": 24, "positions": 1.0}
    objective: Objective = changes.pop("objective", KLDivergence())
    return InProcess(
        model, describe(model), paired_ids(5, TOKENS, 100), objective, **(settings | changes)
    )


@EVERY
def test_losses_are_those_of_the_masked_models_logits_where_a_target_follows(
    model_type: str,
) -> None:
    model = tiny_model(model_type)
    judges = [backend("", model=model, objective=o) for o in (KLDivergence(), CrossEntropy())]
    anatomy, masks = describe(model), assorted_masks(SITES)
    ids = paired_ids(5, TOKENS, 100)
    read, written = ids.chunk(2, dim=1)
    inputs = {"input_ids": read, "attention_mask": (read != 0).long(), "decoder_input_ids": written}
    follows = (written[:, 1:] != 0).float()
    found = [[judge.run(batch, masks) for batch in range(len(judge.sequences))] for judge in judges]
    assert judges[0].sequences == (2, 2, 1)
    with torch.no_grad():
        dense = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
        for place, mask in enumerate(masks):
            with masked(model, anatomy, mask):
                logits = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
            kl = (dense.exp() * (dense - logits)).sum(-1)
            ce = -logits.gather(-1, written[:, 1:].unsqueeze(-1)).squeeze(-1)
            for units, each in zip(found, (kl, ce), strict=True):
                expected = (each * follows).sum(-1) / follows.sum(-1)
                flat = [loss for unit in units for loss in unit.losses[place]]
                assert flat == pytest.approx(expected.tolist(), abs=1e-4, rel=1e-4)


@EVERY
def test_shared_losses_equal_whole_masked_passes_bit_for_bit(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16)
    shared = backend("", model=model, positions=0.5)
    whole = backend("", model=model, positions=0.5, mode=Mode.WHOLE)
    masks = assorted_masks(SITES)
    for batch in range(3):
        found, expected = shared.run(batch, masks), whole.run(batch, masks)
        assert found.losses == expected.losses
        assert found.statuses == (Status.OK,) * len(masks)
        assert found.cost_tokens < expected.cost_tokens
        assert found.cost_tokens == shared.unit_cost(batch, masks)
        assert shared.run(batch, masks[::-1]).losses == found.losses[::-1]


@EVERY
def test_hints_are_cosines_over_the_tokens_of_each_stack(model_type: str) -> None:
    judge = backend(model_type)
    hints, cost = judge.hints()
    ids = paired_ids(5, TOKENS, 100)
    recording = judge.replayer.record(ids)
    states = judge.replayer.states(recording)
    read = torch.cat([ids[:, :TOKENS] != 0, torch.zeros(5, TOKENS, dtype=torch.bool)], dim=1)
    written = torch.cat([torch.zeros(5, TOKENS, dtype=torch.bool), ids[:, TOKENS:] != 0], dim=1)
    written[:, TOKENS] = True

    def mean(one: int, other: int, seen: torch.Tensor) -> float:
        parts = (states[one][seen].double(), states[other][seen].double())
        return float(torch.cosine_similarity(*parts, dim=-1).mean())

    for place in range(SITES):
        seen = read if place < 8 else written
        found = hints.cosine[place][place + 1]
        assert found == pytest.approx(mean(place, place + 1, seen), abs=1e-5)
    across = (mean(6, 8, read) + mean(8, 11, written)) / 2
    assert hints.cosine[6][11] == pytest.approx(across, abs=1e-5)
    assert 0 < cost < 5 * TOKENS


def test_the_length_of_sources_and_targets_leaves_hints_as_they_are() -> None:
    """Padding and the other stack's tokens have no part in what a sublayer is said to do."""
    model = tiny_model("mbart")
    rows = paired_ids(6, TOKENS, 100)
    wide = torch.nn.functional.pad(rows.unflatten(1, (2, TOKENS)), (0, 9)).flatten(1)
    settings: dict[str, Any] = {"mode": Mode.SITE, "positions": 1.0, "batch_tokens": 64}
    found = [
        InProcess(model, describe(model), ids, KLDivergence(), **settings).hints()[0]
        for ids in (rows, wide)
    ]
    for site in range(SITES):
        one, other = (hints.cosine[site][site + 1] for hints in found)
        assert one == pytest.approx(other, abs=1e-6)


def test_gradients_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"choose another search\.method"):
        backend("t5").sensitivity()


class TestSamples:
    def test_positions_are_written_tokens_that_another_follows(self) -> None:
        rows = torch.tensor([[5, 6, 7, 0, 0, 9, 8, 0], [5, 0, 0, 0, 2, 4, 4, 4]])
        (sample,) = draw_samples(rows, 64, 1.0, 0, torch.device("cpu"), pad=0)
        assert sample.positions.tolist() == [[4, 5, 5], [4, 5, 6]]
        assert sample.targets.tolist() == [9, 8, 8, 4, 4, 4]
        assert sample.weights is not None
        assert sample.weights.tolist() == [[1, 1, 0], [1, 1, 1]]
        losses = torch.tensor([[1.0, 2.0, 100.0, 3.0, 4.0, 5.0]])
        assert sample.by_sequence(losses).tolist() == [[1.5, 4.0]]

    def test_a_share_of_each_row_is_drawn_and_stays_the_same(self) -> None:
        rows = paired_ids(6, 20)
        drawn = [draw_samples(rows, 80, 0.3, 5, torch.device("cpu"), pad=0) for _ in range(2)]
        for one, other in zip(*drawn, strict=True):
            assert torch.equal(one.positions, other.positions)
        other_seed = draw_samples(rows, 80, 0.3, 6, torch.device("cpu"), pad=0)
        assert any(
            not torch.equal(a.positions, b.positions)
            for a, b in zip(drawn[0], other_seed, strict=True)
        )
        weights = torch.cat([s.weights for s in drawn[0] if s.weights is not None])
        assert weights.sum(1).tolist() == [5, 6, 6, 6, 6, 6]

    @pytest.mark.parametrize("rows", [[[5, 6, 0, 0]], [[5, 6, 2, 4, 1]]])
    def test_rows_without_a_target_are_refused(self, rows: list[list[int]]) -> None:
        with pytest.raises(DataError, match="two equal halves with a target"):
            draw_samples(torch.tensor(rows), 64, 1.0, 0, torch.device("cpu"), pad=0)


class TestTurns:
    """Of two stacks, the first with four sites, the second with six."""

    def targets(self, key: str, repair: Repair) -> list[int | None]:
        steps = steps_of(10, 1, (4, 10))
        return [turn.target for turn in turns_of(Mask.from_key(key), steps, repair)]

    @pytest.mark.parametrize("repair", ["gap", "table"])
    def test_no_gap_reaches_into_the_next_stack(self, repair: Repair) -> None:
        assert self.targets("1100011111", repair) == [None, 4, None, None, None, 6] + [None] * 4
        assert self.targets("1100111111", repair) == [None, 4] + [None] * 8
        assert self.targets("1111001111", repair) == [None] * 6 + [7] + [None] * 3
        assert self.targets("1111111100", repair) == [None] * 7 + [10, None, None]
        assert self.targets("0000111111", repair) == [None] * 10

    def test_what_is_looked_up_behind_a_gap_is_given_the_stream_before_it(self) -> None:
        steps = steps_of(10, 1, (4, 10))
        turns = turns_of(Mask.from_key("0011001001"), steps, "table")
        assert [turn.given for turn in turns] == [None, None, 0] + [None] * 3 + [4] + [None] * 3
        assert [turn.target for turn in turns] == [
            None,
            None,
            3,
            None,
            None,
            None,
            9,
            None,
            None,
            None,
        ]

    def test_what_a_damaged_encoder_reaches_is_refitted_in_sequence(self) -> None:
        found = self.targets("1011111111", "sequential")
        assert found == [2, None, 3, 4, 5, 6, 7, 8, 9, 10]
        assert self.targets("1111110111", "sequential") == [None] * 5 + [7, None, 8, 9, 10]


@pytest.mark.parametrize("repair", ["gap", "sequential"])
@pytest.mark.parametrize("model_type", MENDED)
class TestRepair:
    def test_losses_are_those_of_the_patched_model_and_cost_what_was_planned(
        self, model_type: str, repair: Repair
    ) -> None:
        judge = backend(model_type)
        refitted = Refitted(judge, FIT, repair)
        masks = assorted_masks(SITES, count=9)
        found = refitted.run(0, masks)
        assert found.cost_tokens == refitted.plan(masks) == refitted.unit_cost(0, masks)
        for mask, losses in zip(masks, found.losses, strict=True):
            with patched(judge.replayer.model, judge.replayer.anatomy, refitted.repair(mask)):
                plain = [judge.run(b, [mask]).losses[0] for b in range(len(judge.sequences))]
            assert losses == tuple(loss for batch in plain for loss in batch)

    @pytest.mark.parametrize("gone", [["encoder.2"], ["decoder.1"], ["encoder.1", "decoder.1"]])
    def test_the_streams_come_closer_to_the_dense_ones(
        self, model_type: str, repair: Repair, gone: list[str]
    ) -> None:
        judge = backend(model_type)
        replayer = judge.replayer
        mask = mask_from_names(replayer.anatomy.sites, gone)
        recording = replayer.record(FIT)
        seen = replayer.seen(FIT)
        cut = replayer.whole(recording, mask)
        patches = Refitted(judge, FIT, repair).repair(mask)
        assert patches
        names = [replayer.anatomy.sites[patch.site].name for patch in patches]
        with patched(replayer.model, replayer.anatomy, patches):
            mended = replayer.whole(recording, mask)
        for stack, block in (("encoder", 0), ("decoder", 4)):
            if not any(name.startswith(stack) for name in names):
                continue
            here = replayer.half(seen, block)
            states = [replayer.half(s, block)[here] for s in (cut, mended, recording.last)]
            weights = 1 / states[2].square().mean(-1)
            before, after = (
                float((weights * (s - states[2]).square().mean(-1)).mean()) for s in states[:2]
            )
            assert after < (0.95 if f"{stack}.{gone[-1][-1]}" in gone else 1.0) * before


@pytest.mark.parametrize("model_type", MENDED)
def test_what_is_padding_takes_no_part_in_a_fit(model_type: str) -> None:
    model = tiny_model(model_type)
    mask = mask_from_names(describe(model).sites, ["encoder.2", "decoder.1"])
    wider = torch.cat(
        [part for half in FIT.chunk(2, dim=1) for part in (half, torch.zeros_like(half))], dim=1
    )
    found = [Refitted(backend("", model=model), rows, "gap").repair(mask) for rows in (FIT, wider)]
    for one, other in zip(*found, strict=True):
        assert one.site == other.site
        scale = float(one.weight.abs().max())
        assert torch.allclose(one.weight, other.weight, atol=2e-3 * scale)


@pytest.mark.parametrize("model_type", sorted(set(ENCODER_DECODER_TYPES) - set(MENDED)))
def test_a_norm_behind_every_addition_is_no_place_for_a_repair(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match="normalizes the stream behind every sublayer"):
        Refitted(backend(model_type), FIT, "gap")


SOURCES = [[5, 6, 7, 8, 9], [10, 11, 12], [33, 44, 55, 66, 77, 88, 99, 5]]


def translated(model: Any, source: list[int], ends: set[int]) -> list[int]:
    """One source alone, the whole text written so far put through again for every token."""
    written = [model.config.decoder_start_token_id, 7]
    for _ in range(10):
        with torch.no_grad():
            ids = {
                "input_ids": torch.tensor([source]),
                "decoder_input_ids": torch.tensor([written]),
            }
            token = int(model(**ids, use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return written[2:]


@EVERY
def test_a_batch_with_a_cache_writes_what_each_source_alone_would(model_type: str) -> None:
    model = tiny_model(model_type)
    anatomy = describe(model)
    starts = (model.config.decoder_start_token_id, 7)
    for gone in ([], ["decoder.0.attention"], ["encoder.0.attention", "decoder.1"], ["encoder.2"]):
        with masked(model, anatomy, mask_from_names(anatomy.sites, gone)):
            endless = [translated(model, source, set()) for source in SOURCES]
            ends = {endless[2][4]}
            wanted = [translated(model, source, ends) for source in SOURCES]
            found, passes = translate_greedily(model, SOURCES, starts, 10, sorted(ends))
        assert found == wanted
        assert passes == min(10, 1 + max(map(len, wanted)))


def test_what_is_written_costs_its_source_once_and_every_token_put_through() -> None:
    accounting = backend("t5").accounting
    dense = Mask.dense(SITES)
    encoder, decoder = (sum(accounting.site_flops[a:b]) for a, b in ((0, 8), (8, SITES)))
    expected = 9 * encoder + 4 * (decoder + accounting.head_flops)
    assert accounting.written(dense, 9, 4) == pytest.approx(expected / accounting.dense_flops)
    less = Mask.dropping(SITES, range(8))
    assert accounting.written(less, 9, 4) == pytest.approx(
        4 * (decoder + accounting.head_flops) / accounting.dense_flops
    )
