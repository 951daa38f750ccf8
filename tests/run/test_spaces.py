from __future__ import annotations

from typing import Any

import pytest
from tests.tiny_models import tiny_model

from depthsearch.config import SpaceConfig
from depthsearch.errors import BudgetError, MaskError
from depthsearch.model.anatomy import describe
from depthsearch.run.spaces import make_space, protected_sites


def space_config(**settings: Any) -> SpaceConfig:
    return SpaceConfig.model_validate({"budget": {"drop_sites": 2}} | settings)


@pytest.fixture(scope="module")
def sites() -> Any:
    return describe(tiny_model("llama")).sites


class TestProtect:
    @pytest.mark.parametrize(
        ("entries", "expected"),
        [
            ([], set()),
            (["first"], {0, 1}),
            (["last"], {6, 7}),
            ([2], {4, 5}),
            ([0, 3], {0, 1, 6, 7}),
            (["decoder.1.ffn"], {3}),
            (["decoder.1"], {2, 3}),
            (["first", "decoder.0.attention", "decoder.2.attention"], {0, 1, 4}),
        ],
    )
    def test_entries_name_sites(self, sites: Any, entries: Any, expected: set[int]) -> None:
        assert protected_sites(entries, sites) == expected

    @pytest.mark.parametrize("entry", [4, -1, 99, "decoder.4.ffn", "decoder.1.cross_attention"])
    def test_a_name_the_model_does_not_have_is_refused(self, sites: Any, entry: Any) -> None:
        with pytest.raises(MaskError, match=str(entry).removeprefix("-")):
            protected_sites([entry], sites)


class TestSpace:
    def test_it_is_that_of_the_model_and_the_settings(self) -> None:
        model = tiny_model("llama")
        config = space_config(
            granularity="block", protect=["last"], budget={"keep_flops": 0.8, "context_tokens": 64}
        )
        space = make_space(config, model, describe(model))
        assert space.genes == ((0, 1), (2, 3), (4, 5))
        assert space.budget.metric == "flops"
        longer = space_config(budget={"keep_flops": 0.8, "context_tokens": 128})
        assert make_space(longer, model, describe(model)).cap > space.cap

    def test_a_budget_out_of_reach_names_the_cheapest_cost(self) -> None:
        model = tiny_model("llama")
        config = space_config(budget={"keep_params": 0.1}, protect=["first", "last"])
        with pytest.raises(BudgetError, match=r"cheapest mask of this space costs [\d,]+"):
            make_space(config, model, describe(model))

    def test_sublayers_of_parallel_blocks_can_not_be_packed(self) -> None:
        model = tiny_model("cohere")
        with pytest.raises(MaskError, match="parallel blocks"):
            make_space(space_config(packable=True), model, describe(model))
        blocks = space_config(packable=True, granularity="block")
        assert make_space(blocks, model, describe(model)).packable
