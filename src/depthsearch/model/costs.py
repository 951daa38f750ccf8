"""What each sublayer of a loaded model costs: parameters, bytes, FLOPs and KV-cache bytes."""

from __future__ import annotations

from typing import Any

from torch import nn

from depthsearch.errors import ModelError
from depthsearch.model.anatomy import Anatomy
from depthsearch.space import CostTable, SiteCosts

_SEPARATE = (("q_proj", "k_proj"), ("q", "k"))
"""What encoder-decoders call the projections to queries and to keys."""

_OF_STACK = "relative_attention_bias"


def cost_table(model: nn.Module, anatomy: Anatomy, context_tokens: int = 2048) -> CostTable:
    """The costs of every site of `model`.

    params and bytes count each tensor once, norms with the sublayer they belong to. flops are for
    one generated token at `context_tokens` of context: two per weight of every matrix product, and
    four per head dimension and attended position. kv_bytes are those of one sequence of
    `context_tokens`, per token of it; a sliding window holds no more than its width. With an
    encoder-decoder it is one token read and one generated, each at that much context.
    Raises ModelError for a context of no tokens.
    """
    if context_tokens < 1:
        raise ModelError(f"context_tokens must be at least 1: got {context_tokens}")
    params: list[int] = []
    sizes: list[int] = []
    flops: list[int] = []
    kv: list[int] = []
    shared_params: list[tuple[tuple[int, ...], int]] = []
    shared_bytes: list[tuple[tuple[int, ...], int]] = []
    for index, block in enumerate(anatomy.block_list(model)):
        row, sites = anatomy.rows[index], anatomy.sites_of(index)
        for site in sites:
            parts = [_own(block.get_submodule(path)) for path in row.parts(site.kind)]
            params.append(sum(p.numel() for part in parts for p in part))
            sizes.append(sum(p.numel() * p.element_size() for part in parts for p in part))
            flops.append(2 * sum(p.numel() for part in parts for p in part if p.ndim >= 2))
            kv.append(0)
            if site.kind == "ffn":
                continue
            attention = block.get_submodule(row.sublayer(site.kind))
            attended, width = _attention_shape(model, attention, context_tokens)
            flops[-1] += 4 * attended * width[0]
            if index >= anatomy.encoder_blocks:
                kv[-1] = 2 * width[1] * _element_size(attention) * attended // context_tokens
        both = tuple(site.index for site in sites)
        for norm in row.shared_norms:
            shared_params.append((both, _count(getattr(block, norm))))
            shared_bytes.append((both, _size(getattr(block, norm))))
    every = {id(p): p for p in model.parameters()}.values()
    total_params = sum(p.numel() for p in every)
    total_bytes = sum(p.numel() * p.element_size() for p in every)
    in_params = sum(params) + sum(amount for _, amount in shared_params)
    in_bytes = sum(sizes) + sum(amount for _, amount in shared_bytes)
    return CostTable(
        {
            "params": SiteCosts(total_params - in_params, tuple(params), tuple(shared_params)),
            "bytes": SiteCosts(total_bytes - in_bytes, tuple(sizes), tuple(shared_bytes)),
            "flops": SiteCosts(head_flops(model), tuple(flops)),
            "kv_bytes": SiteCosts(0, tuple(kv)),
        }
    )


def head_flops(model: nn.Module) -> int:
    """FLOPs of the output projection for one position."""
    head: Any = model
    return 2 * int(head.get_output_embeddings().weight.numel())


def _attention_shape(
    model: nn.Module, attention: nn.Module, context_tokens: int
) -> tuple[int, tuple[int, int]]:
    """Attended positions, and the widths of all query heads and of all key heads together."""
    for queries, keys in _SEPARATE if getattr(model, "config").is_encoder_decoder else ():
        if hasattr(attention, queries):
            found = (getattr(attention, name).weight.shape[0] for name in (queries, keys))
            return context_tokens, tuple(found)
    config: Any = getattr(model, "config")
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    dim = int(getattr(attention, "head_dim", None) or config.hidden_size // heads)
    window = getattr(attention, "sliding_window", None)
    if window is None and getattr(config, "layer_types", None) is None:
        # Families without a type for each block apply the window, where there is one, to all.
        window = getattr(config, "sliding_window", None)
    attended = min(context_tokens, int(window)) if window else context_tokens
    return attended, (heads * dim, key_heads * dim)


def _own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that go with a sublayer: a bias from positions is its whole stack's (T5)."""
    return [p for name, p in module.named_parameters() if not name.startswith(_OF_STACK)]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _element_size(module: nn.Module) -> int:
    return next(module.parameters()).element_size()
