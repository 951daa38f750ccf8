"""The model as an ordered list of sites.

Blocks are the one `ModuleList` of same-class layers that have an attention-named child, or where an
encoder-decoder keeps them; the family's row says which children are the sublayers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import nn

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.families import ENCODER_DECODERS, FAMILIES, EncoderDecoder, FamilyRow
from depthsearch.space import Site


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
    stacks: tuple[Stack, ...]
    sites: tuple[Site, ...]

    @property
    def stack(self) -> Stack:
        """The only stack; raises UnsupportedModelError where there are several."""
        if len(self.stacks) > 1:
            raise UnsupportedModelError(
                f"{self.model_class} is an encoder-decoder, and what was asked for is there for "
                "decoder-only models alone"
            )
        return self.stacks[0]

    @cached_property
    def rows(self) -> tuple[FamilyRow, ...]:
        """The row of each block, those of all stacks in one list, as everywhere."""
        return tuple(stack.row for stack in self.stacks for _ in range(stack.blocks))

    @property
    def encoder_blocks(self) -> int:
        """How many blocks belong to an encoder: they come first."""
        return self.stacks[0].blocks if len(self.stacks) > 1 else 0

    @property
    def stack_ends(self) -> tuple[int, ...]:
        """For each stack the index of the first site behind it."""
        names = [site.stack for site in self.sites]
        return tuple(len(names) - names[::-1].index(stack.name) for stack in self.stacks)

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        """The model's own list of blocks, or a list of those of all stacks."""
        lists = self.module_lists(model)
        return lists[0] if len(lists) == 1 else nn.ModuleList(b for found in lists for b in found)

    def module_lists(self, model: nn.Module) -> tuple[nn.ModuleList, ...]:
        """The model's own list of blocks of each stack."""
        return tuple(cast(nn.ModuleList, model.get_submodule(s.path)) for s in self.stacks)

    def sites_of(self, block: int) -> tuple[Site, ...]:
        """The sites of one block."""
        return self._by_block[block]

    def block_of(self, site: Site) -> int:
        """The place of a site's block among those of all stacks."""
        before = 0
        for stack in self.stacks:
            if stack.name == site.stack:
                break
            before += stack.blocks
        return before + site.block

    @cached_property
    def _by_block(self) -> tuple[tuple[Site, ...], ...]:
        found: list[list[Site]] = [[] for _ in self.rows]
        for site in self.sites:
            found[self.block_of(site)].append(site)
        return tuple(map(tuple, found))


def describe(model: nn.Module) -> Anatomy:
    """Find the blocks and sublayers of a causal language model or an encoder-decoder.

    Raises UnsupportedModelError with the model's class and what would be needed.
    """
    config: Any = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", "unknown"))
    name = type(model).__name__
    known = ", ".join(sorted([*FAMILIES, *ENCODER_DECODERS]))
    if model_type not in FAMILIES and model_type not in ENCODER_DECODERS:
        raise UnsupportedModelError(
            f"{name} (model type '{model_type}') is not supported: supported types are {known}; a "
            "new family needs a row in depthsearch/model/families.py naming its attention, FFN and "
            "norms"
        )
    head = getattr(model, "get_output_embeddings", None)
    if not callable(head) or head() is None:
        raise UnsupportedModelError(
            f"{name} has no language-model head: load the model as a causal language model"
        )
    if model_type in ENCODER_DECODERS:
        return _of_stacks(model, model_type, ENCODER_DECODERS[model_type])
    row = FAMILIES[model_type]
    found = [(path, blocks) for path, blocks in _block_lists(model) if _has(blocks[0], row)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name} (model type '{model_type}') has {len(found)} lists of blocks with children "
            f"'{row.attention}' and '{row.ffn}': exactly one is needed; its row in "
            "depthsearch/model/families.py does not describe it"
        )
    path, blocks = found[0]
    _check(name, blocks, row)
    return _anatomy(model_type, name, (Stack("decoder", path, row, len(blocks)),))


def context_window(model: Any) -> int | None:
    """The most tokens that the model takes, prompt and answer, None if its config sets no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _of_stacks(model: nn.Module, model_type: str, family: EncoderDecoder) -> Anatomy:
    """The anatomy of an encoder-decoder."""
    name = type(model).__name__
    stacks: list[Stack] = []
    for stack, path, row in (
        ("encoder", family.encoder_path, family.encoder),
        ("decoder", family.decoder_path, family.decoder),
    ):
        try:
            blocks = model.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{name} (model type '{model_type}') has no '{path}': load the whole "
                "encoder-decoder, with its language-model head"
            ) from error
        assert isinstance(blocks, nn.ModuleList)
        _check(name, blocks, row)
        stacks.append(Stack(stack, path, row, len(blocks)))
    return _anatomy(model_type, name, tuple(stacks))


def _check(name: str, blocks: nn.ModuleList, row: FamilyRow) -> None:
    odd = [i for i, block in enumerate(blocks) if not _has(block, row)]
    if odd:
        raise UnsupportedModelError(
            f"{name}: block {odd[0]} lacks '{row.attention}', '{row.ffn}', their output "
            "projections or one of their norms, so the family's row in "
            "depthsearch/model/families.py does not describe it"
        )


def _anatomy(model_type: str, name: str, stacks: tuple[Stack, ...]) -> Anatomy:
    sites: list[Site] = []
    for stack in stacks:
        for block in range(stack.blocks):
            sites += [
                Site(len(sites) + place, stack.name, block, kind)
                for place, kind in enumerate(stack.row.kinds)
            ]
    return Anatomy(model_type, name, stacks, tuple(sites))


def require_decoder_only(model: Any, what: str) -> None:
    """Raise UnsupportedModelError for an encoder-decoder, which `what` can't take."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder, and {what} takes decoder-only models"
        )


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
    """Whether a block has all that its row names, with projections inside its sublayers."""
    paths = [*row.shared_norms]
    for kind in row.kinds:
        paths += [*row.parts(kind), row.projection(kind)]
    try:
        for path in paths:
            block.get_submodule(path)
        attention = block.get_submodule(row.attention)
    except AttributeError:
        return False
    return "attention" in type(attention).__name__.lower()
