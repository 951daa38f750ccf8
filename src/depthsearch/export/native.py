"""Truncation: what a packable mask keeps, as an ordinary checkpoint of the same family.

New block k takes its attention (with its norms) from block i and its FFN (with its norms) from
block j of the dense model, `plan.pairs[k] == (i, j)`. Nothing here copies a tensor or changes the
dense model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from depthsearch.errors import ExportError, MaskError
from depthsearch.model.anatomy import Anatomy
from depthsearch.space import Mask, is_packable, pairing

_THRESHOLDS = {"max_window_layers": "attention", "first_k_dense_replace": "ffn"}
"""Settings that split the blocks into the first n and the rest."""

_BLOCK_NUMBERS = {"mlp_only_layers": "ffn", "cross_attention_layers": "attention"}
"""Lists that name blocks by number."""

_PERIODS = ("sliding_window_pattern", "_sliding_window_pattern")
"""Settings that only stand in for `layer_types` where that is absent."""

_TIED_TO_PLACE = {
    "num_kv_shared_layers": "lets the last blocks reuse the keys of earlier ones",
    "scale_attn_by_inverse_layer_idx": "scales each attention by the number of its block",
}
"""Settings under which a block computes something else in another place."""

_NOT_PER_LAYER = ("architectures", "keys_to_ignore_at_inference", "suppress_tokens")


@dataclass(frozen=True)
class NativePlan:
    """The blocks of the small model, each `(block of its attention, block of its FFN)`."""

    pairs: tuple[tuple[int, int], ...]
    dense_blocks: int

    @property
    def is_dense(self) -> bool:
        """Whether every block stays where it is."""
        return self.pairs == tuple((block, block) for block in range(self.dense_blocks))


def plan_native(anatomy: Anatomy, mask: Mask) -> NativePlan:
    """How the kept sublayers form ordinary blocks.

    Raises ExportError, with the reason, for a mask that ordinary blocks can't express, and
    MaskError for a mask made for another model.
    """
    sites = anatomy.sites
    if len(mask) != len(sites):
        raise MaskError(
            f"the mask has {len(mask)} sites but the model has {len(sites)}: it was made for "
            "another model"
        )
    if not mask.kept:
        raise ExportError("the mask drops every block: keep at least one to export a model")
    if anatomy.stack.row.parallel:
        for block in range(anatomy.stack.blocks):
            attention, ffn = anatomy.sites_of(block)
            if mask.keep[attention.index] != mask.keep[ffn.index]:
                gone = ffn if mask.keep[attention.index] else attention
                raise ExportError(
                    f"{anatomy.model_class} runs attention and FFN of a block side by side, so a "
                    f"native export drops whole blocks only, but the mask drops {gone.name} alone; "
                    "search with 'granularity: block'"
                )
    if not is_packable(mask, sites):
        start, stop = next(run for run in mask.runs if (run[1] - run[0]) % 2)
        run = (
            f"{sites[start].name} alone"
            if stop - start == 1
            else f"{stop - start} neighbouring sublayers, {sites[start].name} to "
            f"{sites[stop - 1].name}, an odd number"
        )
        raise ExportError(
            "a native export needs what is kept to alternate attention and FFN, but the mask drops "
            f"{run}; search with 'packable: true' (free sublayer masks need another format, which "
            "is not available yet)"
        )
    return NativePlan(pairing(mask, sites), anatomy.stack.blocks)


def truncated_config(config: Any, plan: NativePlan) -> Any:
    """A deep copy of `config` for the small model, every per-layer setting cut to its blocks.

    A list with one entry for each dense block follows the attention, or the FFN where its name
    says so. Raises ExportError for a setting that can't be right once blocks have moved.
    """
    small = copy.deepcopy(config)
    _refuse_fixed_places(small, plan)
    for name, value in list(vars(small).items()):
        if name in _THRESHOLDS and isinstance(value, int) and not isinstance(value, bool):
            blocks = _blocks(plan, _THRESHOLDS[name])
            setattr(small, name, sum(block < value for block in blocks))
        elif name in _BLOCK_NUMBERS and isinstance(value, list | tuple):
            blocks = _blocks(plan, _BLOCK_NUMBERS[name])
            setattr(small, name, [new for new, old in enumerate(blocks) if old in value])
        elif isinstance(value, list | tuple) and _is_per_layer(name, value, plan):
            ffn = name.startswith(("mlp", "ffn", "moe", "intermediate"))
            blocks = _blocks(plan, "ffn" if ffn else "attention")
            setattr(small, name, type(value)(value[block] for block in blocks))
    if getattr(small, "layer_types", None) is not None:
        for name in _PERIODS:
            if isinstance(vars(small).get(name), int):
                delattr(small, name)
    small.num_hidden_layers = len(plan.pairs)
    # The files that this entry names are not part of the export.
    vars(small).pop("auto_map", None)
    return small


def truncated_state(model: nn.Module, anatomy: Anatomy, plan: NativePlan) -> dict[str, Tensor]:
    """The weights of the small model under its own names, sharing memory with the dense model's.

    Of tied weights only the one that `save_pretrained` writes is listed. Raises ExportError where
    a re-paired block holds weights that belong to neither sublayer.
    """
    row, prefix = anatomy.stack.row, f"{anatomy.stack.path}."
    attention = {row.attention, *row.attention_norms}
    ffn = {row.ffn, *row.ffn_norms}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state: dict[str, Tensor] = {}
    by_block: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if not name.startswith(prefix):
            state[name] = tensor
            continue
        number, _, inner = name.removeprefix(prefix).partition(".")
        by_block.setdefault(int(number), []).append((inner, tensor))
    for new, (first, second) in enumerate(plan.pairs):
        for inner, tensor in by_block[first]:
            child = inner.partition(".")[0]
            if first != second and child not in attention | ffn:
                raise ExportError(
                    f"{anatomy.model_class}: block {first} holds '{inner}' outside its attention, "
                    "FFN and norms, so its sublayers can't be re-paired; drop whole blocks only"
                )
            if child not in ffn:
                state[f"{prefix}{new}.{inner}"] = tensor
        for inner, tensor in by_block[second]:
            if inner.partition(".")[0] in ffn:
                state[f"{prefix}{new}.{inner}"] = tensor
    return state


def _blocks(plan: NativePlan, side: str) -> list[int]:
    return [pair[1 if side == "ffn" else 0] for pair in plan.pairs]


def _is_per_layer(name: str, value: list[Any] | tuple[Any, ...], plan: NativePlan) -> bool:
    if name in _NOT_PER_LAYER or name.endswith(("token_id", "_ids", "_tokens")):
        return False
    if len(value) == plan.dense_blocks:
        return True
    if value and name.endswith(("_layers", "_layer_types", "_idxs")) and not plan.is_dense:
        raise ExportError(
            f"the model's setting '{name}' has {len(value)} entries for {plan.dense_blocks} "
            "blocks, so it can't be cut to the kept blocks; this model has no native export yet"
        )
    return False


def _refuse_fixed_places(config: Any, plan: NativePlan) -> None:
    for name, what in _TIED_TO_PLACE.items():
        value = getattr(config, name, None)
        if value and not plan.is_dense:
            raise ExportError(
                f"the model's setting '{name}: {value}' {what}, so no block can be removed or "
                "moved; this model has no native export yet"
            )
