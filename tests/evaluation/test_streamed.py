"""Breadth-first evaluation with streamed weights equals the resident model, bit for bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.evaluation.test_inprocess import Watching, run_out_of_memory
from tests.evaluation.tiny_backends import assorted_masks
from tests.tiny_models import PARALLEL_TYPES, keeping, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM

from depthsearch.calibration.objectives import OBJECTIVES, CrossEntropy, KLDivergence, Objective
from depthsearch.errors import DataError, ModelError
from depthsearch.evaluation import Backend, InProcess, Streamed, evaluate, executed_sites
from depthsearch.evaluation.breadth import Prefixes
from depthsearch.model.anatomy import describe
from depthsearch.model.families import FAMILIES
from depthsearch.model.replay import Mode
from depthsearch.model.streaming import StreamedModel
from depthsearch.space import Mask, Status

SITES = 8
STATE = 5 * 12 * 64 * 4
"""Bytes of one hidden state of all batches: 5 sequences of 12 tokens, 64 wide, float32."""
LOOKED_AT = 5 * 6 * 64 * 4
"""Bytes of one mask's hidden states at the positions looked at: 6 of 12."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny saved model of a family."""

    @cache
    def saved(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folder)
        return folder

    return saved


def mode_of(family: str) -> Mode:
    return Mode.BLOCK if family in PARALLEL_TYPES else Mode.SITE


def streamed(folder: Path, dtype: str = "float32", **settings: Any) -> Streamed:
    model = StreamedModel.open(folder, dtype, "cpu")
    return backend(Streamed, model, describe(model.model).model_type, **settings)


def resident(folder: Path, dtype: str = "float32", **settings: Any) -> InProcess:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    made: InProcess = backend(
        lambda *args, **rest: InProcess(model, describe(model), *args[1:], **rest),
        None, describe(model).model_type, **settings,
    )  # fmt: skip
    return made


def backend(
    factory: Any, model: Any, family: str, objective: Objective | None = None, **settings: Any
) -> Any:
    """Three batches, of two sequences and one, of 12 tokens."""
    windows = tiny_ids(5, 12, seed=100)
    options = {"mode": mode_of(family), "batch_tokens": 24, "positions": 0.5} | settings
    return factory(model, windows, objective or KLDivergence(), **options)


def all_units(made: Backend, masks: Sequence[Mask]) -> list[Any]:
    return [made.run(batch, masks) for batch in range(len(made.sequences))]


CHOSEN = [
    keeping("11 11 11 11"),
    keeping("01 11 01 11"),  # without attention
    keeping("11 10 10 11"),  # without FFN
    keeping("11 00 11 00"),  # whole blocks
    keeping("10 00 00 01"),  # one run
    keeping("00 00 00 01"),
    keeping("10 00 00 00"),
    keeping("00 00 00 00"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_costs_and_hints_equal_the_resident_model(
    family: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    """All stored in float32, so in bfloat16 the weights are converted while they are read."""
    ours = streamed(checkpoint(family), dtype)
    theirs = resident(checkpoint(family), dtype)
    assert ours.sequences == theirs.sequences
    assert ours.window_tokens == theirs.window_tokens
    assert ours.preparation == theirs.preparation
    for masks in (CHOSEN, assorted_masks(SITES), [CHOSEN[3]]):
        assert ours.plan(masks) == theirs.plan(masks)
        assert ours.run_all(masks) == all_units(theirs, masks)
        assert ours.passes == 1
    assert ours.hints() == theirs.hints()
    assert ours.run(1, CHOSEN) == theirs.run(1, CHOSEN)


@pytest.fixture(scope="module")
def pair(checkpoint: Callable[[str], Path]) -> tuple[Streamed, InProcess]:
    return streamed(checkpoint("llama")), resident(checkpoint("llama"))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=SITES, max_size=SITES), min_size=1, max_size=6))
def test_any_set_of_masks(pair: tuple[Streamed, InProcess], keeps: list[list[bool]]) -> None:
    """In any order, and with a mask more than once."""
    ours, theirs = pair
    masks = [Mask(tuple(keep)) for keep in keeps]
    assert ours.run_all(masks) == all_units(theirs, masks)


@pytest.mark.parametrize("objective", [build() for build in OBJECTIVES.values()])
def test_the_protocol_races_and_reports(objective: Any, checkpoint: Callable[[str], Path]) -> None:
    ours: Backend = streamed(checkpoint("llama"), objective=objective)
    theirs = resident(checkpoint("llama"), objective=objective)
    masks = assorted_masks(SITES)
    assert evaluate(ours, masks, survivors=2) == evaluate(theirs, masks, survivors=2)
    assert isinstance(ours, Streamed)
    seen: list[tuple[int, int]] = []
    found = ours.figures(masks, lambda done, total: seen.append((done, total)))
    assert ours.passes == 1
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for a, b in zip(found, theirs.figures(masks), strict=True):
        assert torch.equal(a, b)
    assert ours.run_all([]) == [type(u)((), (), 0.0) for u in ours.run_all(masks)]
    assert ours.plan([]) == 0.0


def test_gradients_are_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"set model\.streamed to false"):
        streamed(checkpoint("llama")).sensitivity()


class TestReading:
    """What is read from disk, counted."""

    def test_a_generation_reads_every_weight_once(
        self, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours = streamed(checkpoint("llama"))
        model = ours._streamed
        stored = sum(value.nbytes for value in load_file(weights(checkpoint("llama"))).values())
        norm = model.bytes_read
        assert norm == 64 * 4
        names: Counter[str] = Counter()
        load = model._load
        monkeypatch.setattr(model, "_load", lambda some: (names.update(some), load(some)))
        ours.run_all(CHOSEN)
        assert model.bytes_read == stored
        assert set(names.values()) == {1}
        assert len(names) == len(load_file(weights(checkpoint("llama")))) - 1
        for _ in range(2):
            before = model.bytes_read
            names.clear()
            ours.run_all(assorted_masks(SITES))
            read = model.bytes_read - before
            assert read == sum(model.block_bytes) + model.head_bytes
            assert read == stored - norm - model.embedding_bytes
            assert set(names.values()) == {1}
        before = model.bytes_read
        ours.hints()
        assert model.bytes_read - before == sum(model.block_bytes)

    def test_blocks_that_no_mask_keeps_anything_of_are_not_read(
        self, checkpoint: Callable[[str], Path]
    ) -> None:
        ours = streamed(checkpoint("llama"))
        ours.run_all(CHOSEN)
        model = ours._streamed
        before = model.bytes_read
        ours.run_all([keeping("11 00 00 01"), keeping("01 00 00 00")])
        blocks = model.block_bytes
        assert model.bytes_read - before == blocks[0] + blocks[3] + model.head_bytes

    def test_nothing_of_a_block_stays(self, checkpoint: Callable[[str], Path]) -> None:
        """Never two blocks at a time, and afterwards only the final norm."""
        ours = streamed(checkpoint("gemma2"))
        model = ours._streamed.model
        blocks = ours._streamed.anatomy.block_list(model)
        present: list[list[int]] = []

        def note(*_: Any) -> None:
            held = [i for i, b in enumerate(blocks) if not any(p.is_meta for p in b.parameters())]
            some = [i for i, b in enumerate(blocks) if not all(p.is_meta for p in b.parameters())]
            assert held == some
            assert model.model.embed_tokens.weight.is_meta
            present.append(held)

        for block in blocks:
            block.self_attn.register_forward_pre_hook(note)
        ours.run_all(CHOSEN)
        assert {tuple(held) for held in present} == {(0,), (1,), (2,), (3,)}
        left = [name for name, p in model.named_parameters() if not p.is_meta]
        assert left == ["model.norm.weight"]

    def test_what_is_charged_is_what_ran(self, checkpoint: Callable[[str], Path]) -> None:
        ours = streamed(checkpoint("llama"))
        ours.run_all(CHOSEN)
        tokens = [0] * SITES

        def count(site: int) -> Any:
            def hook(_: Any, args: Any, kwargs: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                tokens[site] += hidden.shape[0] * hidden.shape[1]

            return hook

        for index, block in enumerate(ours._streamed.model.model.layers):
            block.self_attn.register_forward_pre_hook(count(2 * index), with_kwargs=True)
            block.mlp.register_forward_pre_hook(count(2 * index + 1), with_kwargs=True)
        masks = assorted_masks(SITES)
        ours.run_all(masks)
        assert [n / 60 for n in tokens] == executed_sites(masks)


class TestHostMemory:
    @pytest.mark.parametrize("family", ["llama", "cohere"])
    def test_several_passes_give_the_same(
        self, family: str, checkpoint: Callable[[str], Path]
    ) -> None:
        masks = assorted_masks(SITES)
        expected = streamed(checkpoint(family)).run_all(masks)
        least = 3 * STATE + LOOKED_AT
        tight = streamed(checkpoint(family), host_bytes=least)
        passes = []
        for room in (least, 2 * least, 8 * least):
            ours = streamed(checkpoint(family), host_bytes=room)
            assert ours.run_all(masks) == expected
            passes.append(ours.passes)
        assert passes[0] > passes[1] > passes[2] == 1
        assert tight.hints() == streamed(checkpoint(family)).hints()
        assert tight.passes == 3

    def test_a_limit_below_one_mask_is_refused(self, checkpoint: Callable[[str], Path]) -> None:
        with pytest.raises(DataError, match="host_bytes"):
            streamed(checkpoint("llama"), host_bytes=3 * STATE + LOOKED_AT - 1)

    def test_the_limit_holds(
        self, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The bytes that wait, taken after every block, without what enters block 0."""
        room = 6 * STATE
        ours = streamed(checkpoint("llama"), host_bytes=room)
        most = 0
        advance = Prefixes.advance

        def noted(self: Prefixes, block: int) -> None:
            nonlocal most
            advance(self, block)
            states = [state for waiting in self._waiting for state in waiting.values()]
            most = max(most, sum({s.data_ptr(): s.nbytes for s in states}.values()))

        monkeypatch.setattr(Prefixes, "advance", noted)
        ours.run_all(assorted_masks(SITES))
        assert ours.passes > 1
        assert 2 * STATE <= most <= room - 2 * STATE

    @pytest.mark.parametrize("way", ["accelerator", "processor", "python"])
    def test_out_of_memory_splits_the_set(
        self, way: str, checkpoint: Callable[[str], Path]
    ) -> None:
        masks = assorted_masks(SITES)
        poison = masks[3]
        seen: list[Any] = []
        streamed(checkpoint("llama"), objective=Watching(seen.extend)).run(0, [poison])

        def hungry(students: Sequence[Any]) -> None:
            """Room for three masks at once, and none for the poisonous one, on batch 0."""
            if len(students) > 3 or any(torch.equal(student, seen[0]) for student in students):
                run_out_of_memory(way)

        settings = {"objective": Watching(hungry)}
        ours, theirs = streamed(checkpoint("llama"), **settings), resident(checkpoint("llama"))
        found, expected = ours.run_all(masks), all_units(theirs, masks)
        assert ours.passes > 4
        for batch, unit in enumerate(found):
            for place, mask in enumerate(masks):
                failed = mask == poison
                assert unit.statuses[place] is (Status.OUT_OF_MEMORY if failed else Status.OK)
                assert unit.losses[place] == (() if failed else expected[batch].losses[place])


def test_a_broken_site_is_not_finite(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight[0, 0] = math.inf
    model.save_pretrained(tmp_path)
    ours = streamed(tmp_path, objective=CrossEntropy())
    masks = assorted_masks(SITES)
    for unit in ours.run_all(masks):
        for mask, status, losses in zip(masks, unit.statuses, unit.losses, strict=True):
            assert status is (Status.NON_FINITE if mask.keep[5] else Status.OK)
            assert bool(losses) == (not mask.keep[5])
    with pytest.raises(ModelError, match="not finite"):
        ours.hints()


def test_whole_passes_are_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="can't be streamed"):
        streamed(checkpoint("llama"), mode=Mode.WHOLE)


@pytest.mark.parametrize("shape", [(0, 12), (3, 1), (3,)])
def test_windows_without_a_next_token_are_refused(
    shape: tuple[int, ...], checkpoint: Callable[[str], Path]
) -> None:
    model = StreamedModel.open(checkpoint("llama"), "float32", "cpu")
    windows = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(DataError, match="calibration windows"):
        Streamed(model, windows, KLDivergence(), mode=Mode.SITE)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"
