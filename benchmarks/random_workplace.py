"""A random llama with a tokenizer of bytes, a text and a run file, for benchmarks of machinery."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("mask", "block", "keep", "drop", "search", "lose", "find", "small", "deep", "run")
LOUDER = 3


def write_workplace(
    place: Path, sizes: Mapping[str, int], settings: Mapping[str, Mapping[str, Any]]
) -> Path:
    """Write `model`, `text.txt` and `run.yaml` to the folder `place`; returns the run file.

    `sizes` are those of `LlamaConfig`; a vocabulary of 256 is that of the tokenizer. `settings` are
    the sections of the run file, completed by the paths and a budget of 70 %.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():
        # As they come, random weights hardly change the residual stream, and no mask matters.
        for parameter in model.parameters():
            parameter.mul_(LOUDER if parameter.ndim > 1 else 1)
    model.save_pretrained(place / "model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place / "model")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 60)) for _ in range(80)]
    (place / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    config: dict[str, Any] = {section: dict(values) for section, values in settings.items()}
    config["model"]["path"] = "model"
    config["calibration"]["text"] = "text.txt"
    config.setdefault(
        "space", {"granularity": "sublayer", "budget": {"keep_params": 0.7, "of": "blocks"}}
    )
    path = place / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
