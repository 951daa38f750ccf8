from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.evaluation.tiny_backends import assorted_masks, tiny_backend
from tests.tiny_models import PARALLEL_TYPES, SEQUENTIAL_TYPES, VOCAB, tiny_ids, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from depthsearch.calibration import objectives
from depthsearch.calibration.objectives import OBJECTIVES, CrossEntropy, KLDivergence
from depthsearch.errors import DataError, ModelError
from depthsearch.evaluation import InProcess, UnitResult, evaluate, executed_sites
from depthsearch.model.anatomy import describe
from depthsearch.model.costs import cost_table, head_flops
from depthsearch.model.families import FAMILIES
from depthsearch.model.replay import Mode
from depthsearch.model.switches import masked
from depthsearch.space import Mask, Status

DTYPES = (torch.float32, torch.bfloat16)
SITES = 8
EVERY = [build() for build in OBJECTIVES.values()]


def losses_of(backend: InProcess, masks: Sequence[Mask]) -> list[UnitResult]:
    return [backend.run(batch, masks) for batch in range(len(backend.sequences))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_shared_losses_equal_whole_masked_passes_bit_for_bit(
        self, family: str, dtype: torch.dtype
    ) -> None:
        model = tiny_model(family, dtype=dtype)
        shared = tiny_backend(model=model)
        whole = tiny_backend(model=model, mode=Mode.WHOLE)
        assert shared.mode is (Mode.BLOCK if family in PARALLEL_TYPES else Mode.SITE)
        for seed in range(2):
            masks = assorted_masks(SITES, seed)
            for batch in range(3):
                found, expected = shared.run(batch, masks), whole.run(batch, masks)
                assert found.losses == expected.losses
                assert found.statuses == expected.statuses == (Status.OK,) * len(masks)
                assert found.cost_tokens < expected.cost_tokens

    def test_losses_depend_on_neither_order_nor_company(
        self, family: str, dtype: torch.dtype
    ) -> None:
        backend = tiny_backend(family, dtype)
        masks = assorted_masks(SITES)
        together = backend.run(1, masks).losses
        assert backend.run(1, masks[::-1]).losses == together[::-1]
        alone = tuple(backend.run(1, [mask]).losses[0] for mask in masks)
        assert alone == together
        halves = backend.run(1, masks[::2]).losses, backend.run(1, masks[1::2]).losses
        assert halves == (together[::2], together[1::2])


def test_the_families_cover_every_way_of_sharing() -> None:
    assert set(SEQUENTIAL_TYPES) | set(PARALLEL_TYPES) == set(FAMILIES)
    assert SEQUENTIAL_TYPES
    assert PARALLEL_TYPES


def test_losses_are_those_of_plain_masked_logits() -> None:
    """Every position of every window, against `model(ids).logits` under the mask."""
    model = tiny_model("llama")
    backend = tiny_backend(model=model, positions=1.0)
    plain = tiny_backend(model=model, positions=1.0, objective=CrossEntropy())
    anatomy, ids = describe(model), tiny_ids(5, 12, seed=100)
    masks = assorted_masks(SITES)
    with torch.no_grad():
        dense = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        for place, mask in enumerate(masks):
            with masked(model, anatomy, mask):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            kl = (dense.exp() * (dense - logits)).sum(-1).mean(-1)
            ce = -logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1).mean(-1)
            for judge, expected in ((backend, kl), (plain, ce)):
                found = [r.losses[place] for r in losses_of(judge, masks)]
                flat = [loss for part in found for loss in part]
                assert flat == pytest.approx(expected.tolist(), abs=2e-5)


@pytest.mark.parametrize("objective", EVERY, ids=lambda objective: objective.name)
@pytest.mark.parametrize("family", ["llama", "cohere", "gemma2"])
def test_every_objective_is_that_of_whole_masked_passes_bit_for_bit(
    family: str, objective: Any
) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    shared = tiny_backend(model=model, objective=objective)
    whole = tiny_backend(model=model, objective=objective, mode=Mode.WHOLE)
    masks = assorted_masks(SITES)
    together = shared.run(0, masks)
    assert together.losses == whole.run(0, masks).losses
    assert together.statuses == (Status.OK,) * len(masks)
    assert tuple(shared.run(0, [mask]).losses[0] for mask in masks) == together.losses
    assert len(set(together.losses)) == len(masks)


def test_batches_and_windows() -> None:
    backend = tiny_backend(rows=5, tokens=12, batch_tokens=24)
    assert backend.sequences == (2, 2, 1)
    assert backend.window_tokens == 12
    assert [len(r.losses[0]) for r in losses_of(backend, [Mask.dense(SITES)])] == [2, 2, 1]


def test_positions_are_drawn_from_the_seed_alone() -> None:
    masks = assorted_masks(SITES)
    model = tiny_model("llama")
    first = [tiny_backend(model=model, mode=Mode.SITE, positions=0.3) for _ in range(2)]
    assert first[0].run(0, masks).losses == first[1].run(0, masks).losses
    windows = tiny_ids(5, 12, seed=100)
    other = InProcess(
        model, describe(model), windows, KLDivergence(),
        mode=Mode.SITE, batch_tokens=24, positions=0.3, seed=1,
    )  # fmt: skip
    assert other.run(0, masks).losses != first[0].run(0, masks).losses
    for backend, share in ((first[0], 4), (tiny_backend(positions=1e-9), 1)):
        for sample in backend.samples:
            assert sample.positions.shape[1] == share
            assert all(len(set(row)) == share for row in sample.positions.tolist())
            assert sample.positions.max() <= 10


@pytest.mark.parametrize("shape", [(0, 12), (3, 1), (3,)])
def test_windows_without_a_next_token_are_refused(shape: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    windows = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(DataError, match="calibration windows"):
        InProcess(model, describe(model), windows, KLDivergence(), mode=Mode.SITE)


class TestCost:
    @pytest.mark.parametrize("family", ["llama", "cohere"])
    @pytest.mark.parametrize("mode", [None, Mode.WHOLE])
    @pytest.mark.parametrize("objective", EVERY, ids=lambda objective: objective.name)
    def test_the_plan_is_what_is_charged(
        self, family: str, mode: Mode | None, objective: Any
    ) -> None:
        backend = tiny_backend(family, mode=mode, objective=objective)
        masks = assorted_masks(SITES)
        evaluations, cost = evaluate(backend, masks)
        assert all(e.status is Status.OK for e in evaluations)
        assert cost == pytest.approx(backend.plan(masks), rel=1e-12)
        assert backend.plan([]) == 0.0

    @pytest.mark.parametrize("family", ["llama", "cohere"])
    def test_what_is_charged_is_what_ran(self, family: str) -> None:
        """Calls of the sublayers and rows of the head, counted by hooks on the model itself."""
        model = tiny_model(family)
        backend = tiny_backend(model=model, positions=0.5)
        anatomy = describe(model)
        masks = assorted_masks(SITES)
        backend.run(0, masks)  # records the batch
        row = anatomy.stack.row
        tokens = dict.fromkeys(range(SITES), 0)
        rows = [0]

        def count(site: int) -> Any:
            def hook(_: Any, args: Any, kwargs: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                tokens[site] += hidden.shape[0] * hidden.shape[1]

            return hook

        def head(_: Any, args: Any) -> None:
            rows[0] += args[0].shape[0] * args[0].shape[1]

        for index, block in enumerate(anatomy.block_list(model)):
            for place, name in enumerate((row.attention, row.ffn)):
                part = getattr(block, name)
                part.register_forward_pre_hook(count(2 * index + place), with_kwargs=True)
        model.get_output_embeddings().register_forward_pre_hook(head)
        found = backend.run(0, masks)

        flops = cost_table(model, anatomy, 12).of("flops").sites
        dense = sum(flops) + head_flops(model)
        spent = sum(n * flops[site] for site, n in tokens.items()) + rows[0] * head_flops(model)
        assert found.cost_tokens == pytest.approx(spent / dense, rel=1e-12)
        width = 2 if family == "cohere" else 1
        assert [n / 24 for n in tokens.values()] == executed_sites(masks, width)

    def test_one_token_through_the_dense_model_costs_one(self) -> None:
        backend = tiny_backend(positions=1.0, objective=CrossEntropy(), rows=4, batch_tokens=48)
        # The last token of a window has no target, so the head runs for 11 of 12.
        (result,) = losses_of(backend, [Mask.dense(SITES)])
        model = tiny_model("llama")
        flops = cost_table(model, describe(model), 12).of("flops").sites
        head = head_flops(model)
        expected = 48 * (sum(flops) + 11 / 12 * head) / (sum(flops) + head)
        assert result.cost_tokens == pytest.approx(expected, rel=1e-12)
        assert backend.preparation == pytest.approx(48 * sum(flops) / (sum(flops) + head))

    def test_a_greedy_step_is_planned_at_about_half(self) -> None:
        backend = tiny_backend(blocks=30, positions=1e-9)
        dense = Mask.dense(60)
        step = [dense.without([site]) for site in range(60)]
        alone = sum(backend.plan([mask]) for mask in step)
        assert alone / backend.plan(step) >= 1.8  # with every head, which nothing can share


class TestFailures:
    def test_a_mask_that_keeps_a_broken_site_is_not_finite(self) -> None:
        model = tiny_model("llama")
        broken = model.model.layers[2].mlp.down_proj.weight
        broken[0, 0] = math.inf
        # The teacher keeps the site as well, so losses that need no teacher tell the masks apart.
        backend = tiny_backend(model=model, objective=CrossEntropy(), mode=Mode.SITE)
        masks = assorted_masks(SITES)
        assert {mask.keep[5] for mask in masks} == {True, False}
        results = losses_of(backend, masks)
        for place, mask in enumerate(masks):
            status = Status.NON_FINITE if mask.keep[5] else Status.OK
            assert {r.statuses[place] for r in results} == {status}
            assert all(bool(r.losses[place]) == (status is Status.OK) for r in results)
        evaluations, _ = evaluate(backend, masks)
        for evaluation in evaluations:
            assert (evaluation.loss is None) == evaluation.mask.keep[5]
            assert (evaluation.tokens == 0) == evaluation.mask.keep[5]

    def test_hints_of_a_broken_model_are_refused(self) -> None:
        model = tiny_model("llama")
        model.model.layers[2].mlp.down_proj.weight[0, 0] = math.inf
        with pytest.raises(ModelError, match="not finite"):
            tiny_backend(model=model, mode=Mode.SITE).hints()

    @pytest.mark.parametrize("way", ["accelerator", "processor", "python"])
    def test_out_of_memory_splits_the_set_down_to_the_masks_that_fit(self, way: str) -> None:
        model = tiny_model("llama")
        masks = assorted_masks(SITES)
        expected = tiny_backend(model=model).run(0, masks)
        poison = masks[3]
        seen: list[Tensor] = []
        tiny_backend(model=model, objective=Watching(seen.extend)).run(0, [poison])

        def hungry(students: Sequence[Tensor]) -> None:
            """Room for three masks at once, and none for the poisonous one."""
            if len(students) > 3 or any(torch.equal(student, seen[0]) for student in students):
                run_out_of_memory(way)

        backend = tiny_backend(model=model, objective=Watching(hungry))
        found = backend.run(0, masks)
        for place, mask in enumerate(masks):
            if mask == poison:
                assert found.statuses[place] is Status.OUT_OF_MEMORY
                assert found.losses[place] == ()
            else:
                assert found.statuses[place] is Status.OK
                assert found.losses[place] == expected.losses[place]
        assert backend.run(0, [poison]).statuses == (Status.OUT_OF_MEMORY,)

    def test_other_errors_are_not_swallowed(self) -> None:
        def wrong(_: Sequence[Tensor]) -> None:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        with pytest.raises(RuntimeError, match="mat1"):
            tiny_backend(objective=Watching(wrong)).run(0, [Mask.dense(SITES)])


@dataclass
class Watching:
    """KL divergence that shows the hidden states of its masks to `watch` first."""

    watch: Callable[[Sequence[Tensor]], None]
    name: str = "watching"
    needs_teacher: bool = True

    def losses(
        self, logits: Any, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Tensor:
        self.watch(students)
        return KLDivergence().losses(logits, students, teacher, targets)


def run_out_of_memory(way: str) -> None:
    """As an accelerator, as Python, or as torch does on the processor: really asking for it."""
    if way == "python":
        raise MemoryError
    if way == "accelerator":
        raise torch.OutOfMemoryError("CUDA out of memory")
    torch.empty(1 << 55)


def test_the_model_is_left_as_it_was() -> None:
    for family in ("llama", "cohere"):
        model = tiny_model(family)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        blocks = list(describe(model).block_list(model))
        ids = tiny_ids(2, 12)
        logits = model(input_ids=ids).logits
        for mode in (None, Mode.WHOLE):
            backend = tiny_backend(model=model, mode=mode)
            evaluate(backend, assorted_masks(SITES), survivors=2)
            backend.hints()
            backend.figures(assorted_masks(SITES))
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        now = list(describe(model).block_list(model))
        assert [id(block) for block in now] == [id(block) for block in blocks]
        assert torch.equal(model(input_ids=ids).logits, logits)


class Largest(TorchDispatchMode):
    """Notes the size of every floating-point tensor that has a dimension of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, tuple | list) else (output,):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if VOCAB in value.shape and 64 not in value.shape:  # 64: weights of the head
                self.vocabulary = max(self.vocabulary, value.numel())
        return output


@contextmanager
def chunks_of(positions: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Largest]:
    monkeypatch.setattr(objectives, "CHUNK_POSITIONS", positions)
    with Largest() as largest:
        yield largest


@pytest.mark.parametrize("objective", [KLDivergence(), CrossEntropy()])
def test_memory_for_logits_is_one_chunk_however_much_text_there_is(
    objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = assorted_masks(SITES)
    for rows in (3, 8):
        backend = tiny_backend(
            objective=objective, rows=rows, tokens=30, batch_tokens=30 * rows, positions=1.0
        )
        assert sum(backend.sequences) * 29 > 10 * 8
        with chunks_of(8, monkeypatch) as largest:
            backend.run(0, masks)
            backend.hints()
        assert largest.vocabulary == 8 * VOCAB


def test_hints_are_similarities_of_the_residual_stream() -> None:
    for family in ("llama", "cohere"):
        model = tiny_model(family)
        backend = tiny_backend(model=model)
        hints, cost = backend.hints()
        assert cost > 0
        assert len(hints.cosine) == len(hints.angular) == SITES + 1
        cosine, angular = torch.tensor(hints.cosine), torch.tensor(hints.angular)
        for matrix, own in ((cosine, 1.0), (angular, 0.0)):
            assert torch.allclose(matrix, matrix.T, atol=1e-6)
            assert torch.allclose(matrix.diagonal(), torch.tensor(own), atol=1e-3)
        ids = tiny_ids(5, 12, seed=100)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        # Before every attention the stream is that between blocks; the last is normed by models.
        for i in range(4):
            for j in range(4):
                a, b = states[i].flatten(0, 1), states[j].flatten(0, 1)
                expected = torch.nn.functional.cosine_similarity(a, b, dim=-1)
                assert hints.cosine[2 * i][2 * j] == pytest.approx(float(expected.mean()), abs=1e-5)
                angle = (expected.clamp(-1, 1).arccos() / math.pi).mean()
                assert hints.angular[2 * i][2 * j] == pytest.approx(float(angle), abs=1e-3)
        assert backend.hints()[0] == hints


def test_measure_gives_every_objective_over_all_windows() -> None:
    backend = tiny_backend(positions=1.0)
    masks = assorted_masks(SITES)
    kl, ce = backend.figures(masks)
    assert kl.shape == ce.shape == (len(masks), 5)
    assert kl.dtype == torch.float64
    evaluations, _ = evaluate(backend, masks)
    assert kl.tolist() == [list(e.losses) for e in evaluations]
    plain = tiny_backend(positions=1.0, objective=CrossEntropy())
    assert ce.tolist() == [list(e.losses) for e in evaluate(plain, masks)[0]]
