"""The architecture table: for each family, which attributes of a block are its sublayers.

A new family needs one row here, or two where it has an encoder, and passes the self-check or is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from depthsearch.space import Kind


@dataclass(frozen=True)
class FamilyRow:
    """Attribute names inside one block of a family.

    `attention_norms` and `ffn_norms` belong to one sublayer and go with it; `shared_norms` belong
    to both sublayers of a parallel block and go only when both go. `attention_out` and `ffn_out`
    name the projections that write to the residual stream, inside the sublayer. `parallel` blocks
    feed the same input to both sublayers, so their sublayers cannot be re-paired. `norm_after`:
    what a sublayer writes passes the last of its norms before it is added to the residual stream.
    `factor` names the attribute of a block that what its sublayers write is multiplied by there.

    Decoders that read an encoder's output do so in `cross_attention`. Where the FFN is no child of
    its own, `ffn` is the last of its layers, which `ffn_inner` come before, and `ffn_out` is empty.
    `post_norm`: the norm of a sublayer normalizes the stream behind the addition. `position_bias`:
    the first attention of a stack makes a bias from positions, which blocks hand on to each other.
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
    cross_attention: str = ""
    cross_attention_norms: tuple[str, ...] = ()
    ffn_inner: tuple[str, ...] = ()
    post_norm: bool = False
    position_bias: bool = False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The sublayers of a block in the order in which they run."""
        return ("attention", "cross_attention", "ffn") if self.cross_attention else _TWO

    def sublayer(self, kind: Kind) -> str:
        """The path of a sublayer in its block."""
        return {
            "attention": self.attention,
            "cross_attention": self.cross_attention,
            "ffn": self.ffn,
        }[kind]

    def norms(self, kind: Kind) -> tuple[str, ...]:
        """The paths of the norms that belong to a sublayer alone."""
        return {
            "attention": self.attention_norms,
            "cross_attention": self.cross_attention_norms,
            "ffn": self.ffn_norms,
        }[kind]

    def parts(self, kind: Kind) -> tuple[str, ...]:
        """The paths of all that goes with a sublayer, in its block."""
        inner = self.ffn_inner if kind == "ffn" else ()
        return (*inner, self.sublayer(kind), *self.norms(kind))

    def projection(self, kind: Kind) -> str:
        """The path of what writes to the residual stream, in its block."""
        out = self.ffn_out if kind == "ffn" else self.attention_out
        return f"{self.sublayer(kind)}.{out}" if out else self.sublayer(kind)

    @property
    def parallel(self) -> bool:
        """Whether both sublayers read the same input."""
        return bool(self.shared_norms)

    @property
    def norm_before(self) -> bool:
        """Whether every sublayer reads the residual stream through a norm."""
        norms = len(self.attention_norms) - self.norm_after
        return (self.parallel or norms > 0) and not self.post_norm


_TWO: tuple[Kind, ...] = ("attention", "ffn")


@dataclass(frozen=True)
class EncoderDecoder:
    """A family with two stacks: the path in the model, and the row, of each one's blocks.

    `encoder_norm` is the path of the norm that the encoder's output passes, None without one.
    """

    encoder_path: str
    encoder: FamilyRow
    decoder_path: str
    decoder: FamilyRow
    encoder_norm: str | None = None


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


def _bart(*, post_norm: bool, encoder_norm: str | None) -> EncoderDecoder:
    encoder = FamilyRow(
        "self_attn",
        "fc2",
        ("self_attn_layer_norm",),
        ("final_layer_norm",),
        "out_proj",
        "",
        ffn_inner=("fc1",),
        post_norm=post_norm,
    )
    decoder = replace(
        encoder,
        cross_attention="encoder_attn",
        cross_attention_norms=("encoder_attn_layer_norm",),
    )
    return EncoderDecoder(
        "model.encoder.layers", encoder, "model.decoder.layers", decoder, encoder_norm
    )


def _t5_row(*, cross_attention: bool) -> FamilyRow:
    ffn = 2 if cross_attention else 1
    return FamilyRow(
        "layer.0.SelfAttention",
        f"layer.{ffn}.DenseReluDense",
        ("layer.0.layer_norm",),
        (f"layer.{ffn}.layer_norm",),
        "o",
        "wo",
        cross_attention="layer.1.EncDecAttention" if cross_attention else "",
        cross_attention_norms=("layer.1.layer_norm",) if cross_attention else (),
        position_bias=True,
    )


_T5 = EncoderDecoder(
    "encoder.block",
    _t5_row(cross_attention=False),
    "decoder.block",
    _t5_row(cross_attention=True),
    "encoder.final_layer_norm",
)

ENCODER_DECODERS: dict[str, EncoderDecoder] = {
    "bart": _bart(post_norm=True, encoder_norm=None),
    "marian": _bart(post_norm=True, encoder_norm=None),
    "mbart": _bart(post_norm=False, encoder_norm="model.encoder.layer_norm"),
    "m2m_100": _bart(post_norm=False, encoder_norm="model.encoder.layer_norm"),
    "t5": _T5,
    "mt5": _T5,
}
