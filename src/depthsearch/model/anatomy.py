"""The model as an ordered list of sites.

Blocks are the one `ModuleList` of same-class layers that have an attention-named child; the row of
the family table says which children are the sublayers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.families import FAMILIES, FamilyRow
from depthsearch.space import Kind, Site

_ORDER: tuple[Kind, Kind] = ("attention", "ffn")


@dataclass(frozen=True)
class Stack:
    """One list of blocks: its public name, its path in the model, and its family's row."""

    name: str
    path: str
    row: FamilyRow
    blocks: int


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model that masks speak about; holds names only, no modules."""

    model_type: str
    model_class: str
    stack: Stack
    sites: tuple[Site, ...]

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        """The model's own list of blocks."""
        return cast(nn.ModuleList, model.get_submodule(self.stack.path))

    def sites_of(self, block: int) -> tuple[Site, Site]:
        """The attention and the FFN site of one block."""
        return self.sites[2 * block], self.sites[2 * block + 1]


def describe(model: nn.Module) -> Anatomy:
    """Find the blocks and sublayers of a causal language model.

    Raises UnsupportedModelError with the model's class and what would be needed.
    """
    config: Any = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", "unknown"))
    name = type(model).__name__
    known = ", ".join(sorted(FAMILIES))
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} (model type '{model_type}') is not supported: supported types are {known}; a "
            "new decoder-only family needs one row in depthsearch/model/families.py naming its "
            "attention, FFN and norms"
        )
    head = getattr(model, "get_output_embeddings", None)
    if not callable(head) or head() is None:
        raise UnsupportedModelError(
            f"{name} has no language-model head: load the model as a causal language model"
        )
    row = FAMILIES[model_type]
    found = [(path, blocks) for path, blocks in _block_lists(model) if _has(blocks[0], row)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name} (model type '{model_type}') has {len(found)} lists of blocks with children "
            f"'{row.attention}' and '{row.ffn}': exactly one is needed; its row in "
            "depthsearch/model/families.py does not describe it"
        )
    path, blocks = found[0]
    odd = [i for i, block in enumerate(blocks) if not _has(block, row)]
    if odd:
        raise UnsupportedModelError(
            f"{name}: block {odd[0]} lacks '{row.attention}', '{row.ffn}', their output "
            "projections or one of their norms, so the family's row in "
            "depthsearch/model/families.py does not describe it"
        )
    sites = tuple(
        Site(2 * block + place, "decoder", block, kind)
        for block in range(len(blocks))
        for place, kind in enumerate(_ORDER)
    )
    return Anatomy(model_type, name, Stack("decoder", path, row, len(blocks)), sites)


def context_window(model: Any) -> int | None:
    """The most tokens that the model takes, prompt and answer, None if its config sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) > 0
            and len({type(block) for block in module}) == 1
            and any("attention" in type(part).__name__.lower() for part in module[0].modules())
        ):
            yield path, module


def _has(block: nn.Module, row: FamilyRow) -> bool:
    names = (row.attention, row.ffn, *row.attention_norms, *row.ffn_norms, *row.shared_norms)
    if not all(isinstance(getattr(block, name, None), nn.Module) for name in names):
        return False
    attention, ffn = getattr(block, row.attention), getattr(block, row.ffn)
    return (
        "attention" in type(attention).__name__.lower()
        and isinstance(getattr(attention, row.attention_out, None), nn.Module)
        and isinstance(getattr(ffn, row.ffn_out, None), nn.Module)
    )
