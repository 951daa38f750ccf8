"""Repairs looked up by gap: what is fitted, what that costs, and that it is the repaired model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.evaluation.test_refitted import FAMILIES_REPAIRED, FIT, SITES
from tests.evaluation.tiny_backends import assorted_masks, tiny_backend
from tests.tiny_models import keeping, tiny_model

from depthsearch.errors import DataError, UnsupportedModelError
from depthsearch.evaluation import InProcess, Refitted
from depthsearch.model.repair import patched
from depthsearch.model.replay import Mode
from depthsearch.space import Mask


def by_sequence(backend: InProcess, mask: Mask) -> tuple[float, ...]:
    units = [backend.run(batch, [mask]) for batch in range(len(backend.sequences))]
    return tuple(loss for unit in units for loss in unit.losses[0])


@pytest.mark.parametrize("family", FAMILIES_REPAIRED)
class TestEveryFamily:
    def test_a_single_gap_is_mended_as_for_its_mask_alone(self, family: str) -> None:
        model = tiny_model(family)
        tabled = tiny_backend(model=model, fit=FIT)
        refitted = Refitted(tiny_backend(model=model), FIT, "gap")
        patterns = ("11 11 00 11", "11 00 00 11", "11 11 11 10", "00 11 11 11", "00 00 11 11")
        for mask in map(keeping, patterns):
            assert by_sequence(tabled, mask) == refitted.run(0, [mask]).losses[0]

    def test_several_gaps_are_each_mended_as_if_alone(self, family: str) -> None:
        model = tiny_model(family)
        judge = tiny_backend(model=model)
        refitted = Refitted(judge, FIT, "gap")
        whole = judge.mode is not Mode.SITE
        alone = [keeping("11 00 11 11"), keeping("11 11 11 00" if whole else "11 11 10 11")]
        both = keeping("11 00 11 00" if whole else "11 00 10 11")
        patches = [patch for mask in alone for patch in refitted.repair(mask)]
        by_sequence(judge, both)  # The dense model is recorded before it is patched.
        with patched(model, judge.replayer.anatomy, patches):
            expected = by_sequence(judge, both)
        assert by_sequence(tiny_backend(model=model, fit=FIT), both) == expected

    def test_losses_and_cost_are_as_planned_whatever_the_company(self, family: str) -> None:
        model = tiny_model(family)
        backend = tiny_backend(model=model, fit=FIT)
        masks = assorted_masks(SITES)
        planned = backend.plan(masks)
        together = [backend.run(batch, masks) for batch in range(len(backend.sequences))]
        cost = backend.prepare(masks) + sum(unit.cost_tokens for unit in together)
        assert cost == pytest.approx(planned, rel=1e-12)
        alone = tiny_backend(model=model, fit=FIT)
        for place, mask in enumerate(masks):
            losses = tuple(loss for unit in together for loss in unit.losses[place])
            assert by_sequence(alone, mask) == losses


def test_a_gap_is_counted_once() -> None:
    backend = tiny_backend(fit=FIT)
    first, longer = keeping("11 10 11 11"), keeping("11 10 01 11")
    fits = backend.prepare([first])
    assert fits > 0
    assert backend.prepare([first]) == 0
    assert backend.plan([first]) == tiny_backend().plan([first])
    # Both in one ask share a Gram matrix.
    assert fits < tiny_backend(fit=FIT).prepare([first, longer]) < fits + backend.prepare([longer])
    assert backend.prepare([keeping("10 10 01 11")]) > 0
    assert backend.prepare([keeping("10 10 11 11")]) == 0
    assert backend.prepare([Mask.dense(SITES)]) == 0
    assert tiny_backend().prepare([first]) == 0
    assert backend.preparation > tiny_backend().preparation


@pytest.mark.parametrize("room", [0, 20_000])
def test_what_is_forgotten_is_fitted_again_to_the_same(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded in a long search, and neither losses nor costs tell."""
    masks = assorted_masks(SITES)
    kept = tiny_backend(fit=FIT)
    expected = [by_sequence(kept, mask) for mask in masks]
    costs = [kept.prepare([mask]) for mask in masks]
    monkeypatch.setattr("depthsearch.evaluation.tabled._ROOM_BYTES", room)
    monkeypatch.setattr("depthsearch.evaluation.tabled._ROOM_SHARE", 0.0)
    backend = tiny_backend(fit=FIT)
    table = backend._table
    assert table is not None
    fitted: list[int] = []
    fit = table._fit.fit

    def counted(step: int, kept: Any, targets: Any, states: Any) -> Any:
        fitted.append(step)
        return fit(step, kept, targets, states)

    monkeypatch.setattr(table._fit, "fit", counted)
    for _ in range(2):
        assert [by_sequence(backend, mask) for mask in masks] == expected
        sizes = [p.weight.numel() * 4 for p in table._patches.values() if p is not None]
        last = len(table._gaps(masks[-1:]))
        assert sum(sizes) <= room or len(table._patches) == last
    assert len(fitted) > len(table._gaps(masks))
    assert [backend.prepare([mask]) for mask in masks] == costs


def test_the_model_is_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tiny_backend(model=model, fit=FIT).run(0, assorted_masks(SITES))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_repaired_is_refused() -> None:
    with pytest.raises(DataError, match="fit_tokens"):
        tiny_backend(fit=FIT[:2]).run(0, [keeping("11 10 11 11")])
    with pytest.raises(UnsupportedModelError, match=r"search\.repair"):
        tiny_backend(mode=Mode.WHOLE, fit=FIT)
