"""Tiny random models of every supported family, and whole checkpoints of them, built in code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

from depthsearch.model.anatomy import Anatomy, describe
from depthsearch.model.families import ENCODER_DECODERS, FAMILIES
from depthsearch.model.load import LoadedModel
from depthsearch.space import Mask

MODEL_TYPES = tuple(FAMILIES)
SEQUENTIAL_TYPES = tuple(name for name, row in FAMILIES.items() if not row.parallel)
ENCODER_DECODER_TYPES = tuple(ENCODER_DECODERS)
PARALLEL_TYPES = tuple(name for name, row in FAMILIES.items() if row.parallel)
VOCAB = 300

CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_GPT2_SIZES: dict[str, Any] = {"n_embd": 64, "n_head": 4, "n_positions": 128}
_BART_SIZES: dict[str, Any] = {
    "d_model": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5_SIZES: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_SLIDING = ("mistral", "phi3", "gemma2", "gemma3_text", "cohere2")
_MIXED = ("gemma2", "gemma3_text", "cohere2")


def tiny_config(model_type: str, blocks: int = 4, **overrides: Any) -> Any:
    """A configuration with sliding windows of 8 tokens where the family has them."""
    if model_type in ENCODER_DECODERS:
        return _two_stacks(model_type, blocks, **overrides)
    settings = dict(_GPT2_SIZES if model_type == "gpt2" else _SIZES)
    settings |= {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings["num_hidden_layers"] = blocks
    if model_type in _SLIDING:
        settings["sliding_window"] = 8
    if model_type in _MIXED:
        kinds = ("sliding_attention", "full_attention", "sliding_attention")
        settings["layer_types"] = [kinds[block % 3] for block in range(blocks)]
    return CONFIG_MAPPING[model_type](**(settings | overrides))


def _two_stacks(model_type: str, blocks: int, **overrides: Any) -> Any:
    """So many blocks to read with, and one less to write with."""
    t5 = model_type in ("t5", "mt5")
    settings = dict(_T5_SIZES if t5 else _BART_SIZES)
    settings |= {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    names = ("num_layers", "num_decoder_layers") if t5 else ("encoder_layers", "decoder_layers")
    settings |= dict(zip(names, (blocks, blocks - 1), strict=True))
    return CONFIG_MAPPING[model_type](**(settings | overrides))


def tiny_model(
    model_type: str,
    blocks: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Any:
    """A random language model; norms and biases are random too, so that each matters."""
    config = tiny_config(model_type, blocks, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Converting afterwards would round the rotary frequencies, which loading never does.
        two = model_type in ENCODER_DECODERS
        loader: Any = AutoModelForSeq2SeqLM if two else AutoModelForCausalLM
        model = loader.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.mul_(3)
    return model.eval().requires_grad_(False)


def tiny_ids(rows: int = 2, tokens: int = 24, seed: int = 0) -> torch.Tensor:
    """Seeded random ids `[rows, tokens]`."""
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB` tokens with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the mask keeps some of the blocks and the search drops the others " * 4] * 4
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(path: Path, model_type: str, blocks: int = 4, **overrides: Any) -> Path:
    """Write a complete checkpoint directory: config, weights, tokenizer, generation settings."""
    tiny_model(model_type, blocks, **overrides).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_loaded(model_type: str, blocks: int = 4, **settings: Any) -> tuple[LoadedModel, Anatomy]:
    """A tiny model with its tokenizer as `load_model` returns it, and its anatomy."""
    model = tiny_model(model_type, blocks, **settings)
    loaded = LoadedModel(
        model, tiny_tokenizer(), f"owner/tiny-{model_type}", "abc", "0" * 64, model.dtype,
        model.device,
    )  # fmt: skip
    return loaded, describe(model)


def keeping(pattern: str) -> Mask:
    """A mask from its key, blanks between blocks allowed: '11 10 01 11'."""
    return Mask.from_key(pattern.replace(" ", ""))


def paired_ids(rows: int = 3, tokens: int = 16, seed: int = 0) -> torch.Tensor:
    """Ids `[rows, 2 * tokens]` to be read and to be written, the first row padded on both sides."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, 2 * tokens), generator=generator)
    ids[0, tokens - 4 : tokens] = 0
    ids[0, -3:] = 0
    return ids
