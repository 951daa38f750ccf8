"""Text that the dense model writes itself, for repairs to be fitted on.

A repair carries over to the kinds of text that it was fitted on. What a model writes when nothing
is asked of it is a sample of all that it knows, and needs no data: LLM-QAT (arXiv 2305.17888)
distils on such text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

from depthsearch import __version__
from depthsearch.errors import DataError, InputError, RunDirectoryError
from depthsearch.model.anatomy import context_window, require_decoder_only
from depthsearch.model.load import LoadedModel, load_model
from depthsearch.run.directory import occupied, write_file

OnText = Callable[[str, int, int], None]

_STAGE = "text"
_FEWEST_A_BATCH = 8
"""Tokens that a batch of texts holds at least where there is room for them, else it is poor."""
_MOST_POOR = 16
"""So many poor batches in a row, and the model has nothing to say."""
_SEEDS = 2**63
"""Torch's seeds stay below; larger ones begin anew."""


@dataclass(frozen=True)
class GenerateOptions:
    """How much is written and how: texts of at most `window_tokens`, sampled at a temperature.

    `start` is what every text begins with and is not part of it; None stands for the token that
    begins a text for the tokenizer, else the one that ends it. `batch` texts are written at a time.
    """

    tokens: int = 32768
    window_tokens: int = 256
    seed: int = 0
    temperature: float = 1.0
    start: str | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        for name in ("tokens", "window_tokens", "batch"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is {getattr(self, name)}; allowed: 1 or more")
        if not self.temperature > 0:
            raise InputError(f"--temperature is {self.temperature:g}; allowed: above 0")
        if self.seed < 0:
            raise InputError(f"--seed is {self.seed}; allowed: 0 or more")


def generate(
    model: str,
    out: Path,
    options: GenerateOptions,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    on_text: OnText | None = None,
) -> dict[str, Any]:
    """Have a model write `options.tokens` tokens to `out`, a jsonl file with the column `text`.

    `on_text(stage, tokens written, tokens wanted)` is told after each batch. Returns the signature
    of the text. Raises RunDirectoryError where `out` exists, InputError of what the model lacks,
    DataError where it writes nothing, StorageError.
    """
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: the name of the text must end in .jsonl")
    if occupied(out):
        raise RunDirectoryError(f"{out} exists already and is never overwritten: choose another")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out.parent}: no such directory")
    loaded = load_model(model, dtype, device, revision)
    tell = on_text or (lambda *_: None)
    tell(_STAGE, 0, options.tokens)
    texts: list[str] = []
    written = 0
    for text, tokens in _texts(loaded, options):
        texts.append(text)
        written += tokens
        tell(_STAGE, min(written, options.tokens), options.tokens)
        if written >= options.tokens:
            break
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    write_file(out, "".join(f"{row}\n" for row in rows))
    return {
        "depthsearch": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": {"source": Path(model).name, "fingerprint": loaded.fingerprint},
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "texts": len(texts),
        "tokens": written,
        "window_tokens": options.window_tokens,
        "temperature": options.temperature,
        "start": _start(loaded, options)[1],
        "batch": options.batch,
        "seed": options.seed,
    }


def _texts(loaded: LoadedModel, options: GenerateOptions) -> Iterator[tuple[str, int]]:
    """Texts without end, each with its tokens; those that say nothing are left out."""
    model, tokenizer = loaded.model, loaded.tokenizer
    require_decoder_only(model, "depthsearch generate")
    ids, _ = _start(loaded, options)
    context = context_window(model)
    if context is not None and len(ids) + options.window_tokens > context:
        raise InputError(
            f"texts of {options.window_tokens} tokens behind {len(ids)} that they begin with "
            f"exceed the model's context of {context}: lower --window-tokens"
        )
    ends = _ends(loaded)
    # Anything that the checkpoint says of how to generate would colour the sample.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=options.temperature,
        top_k=0,
        max_new_tokens=options.window_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=ids[0]),
        bos_token_id=ids[0],
    )
    start = torch.tensor([ids], device=loaded.device).expand(options.batch, -1)
    fewest = min(_FEWEST_A_BATCH, options.batch * options.window_tokens)
    number = poor = 0
    while True:
        # Each batch is seeded anew, so that a longer text begins with a shorter one.
        torch.manual_seed((1_000_003 * options.seed + number) % _SEEDS)
        with torch.inference_mode():
            try:
                found = model.generate(start, attention_mask=torch.ones_like(start))
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise InputError(
                    f"--temperature is {options.temperature:g}: the model's logits overflow when "
                    "they are divided by it; raise it, or load the model in float32 (--dtype)"
                ) from error
        batch = 0
        for row in found[:, len(ids) :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            text = tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
            if text:
                batch += stop
                yield text, stop
        poor = poor + 1 if batch < fewest else 0
        if poor == _MOST_POOR:
            raise DataError(
                f"the model ends {poor * options.batch} texts in a row before it says anything: "
                "give it something to begin with (--start)"
            )
        number += 1


def _start(loaded: LoadedModel, options: GenerateOptions) -> tuple[list[int], str]:
    """The tokens that every text begins with, and what they say."""
    tokenizer = loaded.tokenizer
    if options.start is not None:
        ids = list(tokenizer(options.start, add_special_tokens=True)["input_ids"])
        if not ids:
            raise InputError("--start is empty: give at least one token, or leave it out")
        return ids, options.start
    for token in (tokenizer.bos_token, tokenizer.eos_token):
        if token is not None:
            return [tokenizer.convert_tokens_to_ids(token)], str(token)
    raise InputError("the tokenizer has no token that begins or ends a text: give --start")


def _ends(loaded: LoadedModel) -> frozenset[int]:
    """The tokens that end a text, by the tokenizer and by the checkpoint."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return frozenset(
        int(end) for end in (loaded.tokenizer.eos_token_id, *several) if end is not None
    )
