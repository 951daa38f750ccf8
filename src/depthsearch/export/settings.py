"""The configuration of the small model: every setting that speaks of blocks, cut to those kept."""

from __future__ import annotations

import copy
from typing import Any

from depthsearch.errors import ExportError
from depthsearch.export.native import NativePlan

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

_TWO_COUNTS = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"))
"""What encoder-decoders call the numbers of their blocks."""


def truncated_config(config: Any, plan: NativePlan) -> Any:
    """A deep copy of `config` for the small model, every per-layer setting cut to its blocks.

    A list with one entry for each dense block follows the attention, or the FFN where its name
    says so; that of an encoder-decoder has to be named for its stack. Raises ExportError for a
    setting that can't be right once blocks have moved.
    """
    small = copy.deepcopy(config)
    _refuse_fixed_places(small, plan)
    stacks = plan.stacks
    if len(stacks) == 1:
        _cut(small, plan)
        small.num_hidden_layers = len(plan.pairs)
    else:
        for prefix, stack in zip(("encoder_", "decoder_"), stacks, strict=True):
            _cut(small, stack, prefix)
        _refuse_of_no_stack(small, plan)
        _set_counts(small, plan)
    # The files that this entry names are not part of the export.
    vars(small).pop("auto_map", None)
    return small


def _cut(small: Any, plan: NativePlan, prefix: str = "") -> None:
    """Cut the settings of one stack, those whose names begin with `prefix`."""
    for full, value in list(vars(small).items()):
        if not full.startswith(prefix):
            continue
        name = full.removeprefix(prefix)
        if name in _THRESHOLDS and isinstance(value, int) and not isinstance(value, bool):
            blocks = _blocks(plan, _THRESHOLDS[name])
            setattr(small, full, sum(block < value for block in blocks))
        elif name in _BLOCK_NUMBERS and isinstance(value, list | tuple):
            blocks = _blocks(plan, _BLOCK_NUMBERS[name])
            setattr(small, full, [new for new, old in enumerate(blocks) if old in value])
        elif isinstance(value, list | tuple) and _is_per_layer(full, value, plan):
            ffn = name.startswith(("mlp", "ffn", "moe", "intermediate"))
            blocks = _blocks(plan, "ffn" if ffn else "attention")
            setattr(small, full, type(value)(value[block] for block in blocks))
    if getattr(small, f"{prefix}layer_types", None) is not None:
        for name in _PERIODS:
            if isinstance(vars(small).get(f"{prefix}{name}"), int):
                delattr(small, f"{prefix}{name}")


def _blocks(plan: NativePlan, side: str) -> list[int]:
    return [pair[-1 if side == "ffn" else 0] for pair in plan.pairs]


def _is_per_layer(name: str, value: list[Any] | tuple[Any, ...], plan: NativePlan) -> bool:
    if _speaks_of_no_block(name):
        return False
    if len(value) == plan.dense_blocks:
        return True
    if value and name.endswith(("_layers", "_layer_types", "_idxs")) and not plan.is_dense:
        raise ExportError(
            f"the model's setting '{name}' has {len(value)} entries for {plan.dense_blocks} "
            "blocks, so it can't be cut to the kept blocks; this model has no native export yet"
        )
    return False


def _speaks_of_no_block(name: str) -> bool:
    return name in _NOT_PER_LAYER or name.endswith(("token_id", "_ids", "_tokens"))


def _refuse_fixed_places(config: Any, plan: NativePlan) -> None:
    for name, what in _TIED_TO_PLACE.items():
        value = getattr(config, name, None)
        if value and not plan.is_dense:
            raise ExportError(
                f"the model's setting '{name}: {value}' {what}, so no block can be removed or "
                "moved; this model has no native export yet"
            )


def _refuse_of_no_stack(config: Any, plan: NativePlan) -> None:
    """Refuse lists that may have an entry a block but don't say of which stack."""
    if plan.is_dense:
        return
    counts = {stack.dense_blocks for stack in plan.stacks} | {plan.dense_blocks}
    for name, value in vars(config).items():
        if (
            isinstance(value, list | tuple)
            and not name.startswith(("encoder_", "decoder_"))
            and not _speaks_of_no_block(name)
            and (len(value) in counts or name in _BLOCK_NUMBERS)
        ):
            raise ExportError(
                f"the model's setting '{name}' has {len(value)} entries and does not say whether "
                "they are for the blocks of the encoder or of the decoder, so it can't be cut to "
                "the kept blocks; this model has no native export yet"
            )


def _set_counts(small: Any, plan: NativePlan) -> None:
    for names in _TWO_COUNTS:
        if all(name in vars(small) for name in names):
            for name, stack in zip(names, plan.stacks, strict=True):
                setattr(small, name, len(stack.pairs))
            return
    raise ExportError(
        f"the configuration of {type(small).__name__} does not say how many blocks encoder and "
        "decoder have; this model has no native export yet"
    )
