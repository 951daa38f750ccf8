"""The architecture table: for each family, which attributes of a block are its sublayers.

A new decoder-only family needs one row here, and passes the self-check or is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class FamilyRow:
    """Attribute names inside one block of a family.

    `attention_norms` and `ffn_norms` belong to one sublayer and go with it; `shared_norms` belong
    to both sublayers of a parallel block and go only when both go. `attention_out` and `ffn_out`
    name the projections that write to the residual stream, inside the sublayer. `parallel` blocks
    feed the same input to both sublayers, so their sublayers cannot be re-paired. `norm_after`:
    what a sublayer writes passes the last of its norms before it is added to the residual stream.
    `factor` names the attribute of a block that what its sublayers write is multiplied by there.
    """

    attention: str
    ffn: str
    attention_norms: tuple[str, ...]
    ffn_norms: tuple[str, ...]
    attention_out: str = "o_proj"
    ffn_out: str = "down_proj"
    shared_norms: tuple[str, ...] = ()
    norm_after: bool = False
    factor: str | None = None

    @property
    def parallel(self) -> bool:
        """Whether both sublayers read the same input."""
        return bool(self.shared_norms)

    @property
    def norm_before(self) -> bool:
        """Whether every sublayer reads the residual stream through a norm."""
        return self.parallel or len(self.attention_norms) > self.norm_after


_PRE_NORM = FamilyRow("self_attn", "mlp", ("input_layernorm",), ("post_attention_layernorm",))
_SANDWICH = FamilyRow(
    "self_attn",
    "mlp",
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_after=True,
)
_POST_SUBLAYER = FamilyRow(
    "self_attn",
    "mlp",
    ("post_attention_layernorm",),
    ("post_feedforward_layernorm",),
    norm_after=True,
)
_PARALLEL = FamilyRow("self_attn", "mlp", (), (), shared_norms=("input_layernorm",))

FAMILIES: dict[str, FamilyRow] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "phi3": _PRE_NORM,
    "granite": replace(_PRE_NORM, factor="residual_multiplier"),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": _POST_SUBLAYER,
    "gpt2": FamilyRow("attn", "mlp", ("ln_1",), ("ln_2",), "c_proj", "c_proj"),
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
}
