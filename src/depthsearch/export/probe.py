"""What the export check runs on a model, and the script that runs it in a clean interpreter.

This file imports nothing of depthsearch: the check starts it by path in an isolated interpreter
where importing depthsearch is an error, so an export that passes needs plain transformers only.

    python -I probe.py request.json figures.json

A row of ids of an encoder-decoder is what it reads and then, equally long, what it writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

BLOCKED = "depthsearch"
PASSES = ("prefill", "cached", "padded")

Further = Callable[[int, int], dict[str, Any]]
"""What a model is given besides the tokens from a start to a stop."""


def run_pass(model: Any, name: str, ids: Any, single_steps: int) -> Any:
    """Logits `[batch, seq, vocab]` of `ids` `[batch, seq]`, computed in one of three ways.

    prefill: one forward pass without a cache. cached: two chunks with a cache, then the last
    `single_steps` tokens one by one. padded: the rows left-padded by different lengths, prefilled
    with a cache, then token by token; padding positions hold zeros.

    An encoder-decoder is run on what it writes in the same ways, `[batch, seq / 2, vocab]`; padded
    is the end of what it reads.
    """
    import torch

    with torch.inference_mode():
        if reads_apart(model):
            return _run_two_stacks(model, name, ids, single_steps)
        if name == "prefill":
            return model(input_ids=ids, use_cache=False).logits.cpu()
        cuts = _cuts(name, ids.shape[1], single_steps)
        if name == "cached":
            return _in_pieces(model, ids, cuts, lambda start, stop: {})
        mask = padding_mask(ids)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = _in_pieces(
            model,
            ids,
            cuts,
            lambda start, stop: {
                "attention_mask": mask[:, :stop],
                "position_ids": positions[:, start:stop],
            },
        )
        return logits.masked_fill((mask == 0).cpu().unsqueeze(-1), 0)


def reads_apart(model: Any) -> bool:
    """Whether the model has an encoder for what it reads."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def halves(ids: Any) -> tuple[Any, Any]:
    """What an encoder-decoder reads and what it writes, of ids `[batch, seq]`."""
    half = ids.shape[1] // 2
    return ids[:, :half], ids[:, half:]


def _run_two_stacks(model: Any, name: str, ids: Any, single_steps: int) -> Any:
    read, written = halves(ids)
    mask = _reading_mask(model, read)
    if name == "prefill":
        return model(
            input_ids=read, attention_mask=mask, decoder_input_ids=written, use_cache=False
        ).logits.cpu()
    if name == "padded":
        mask = mask * padding_mask(read).flip(1)
        read = read.masked_fill(mask == 0, model.config.pad_token_id or 0)
    encoded = model.get_encoder()(input_ids=read, attention_mask=mask)
    further = {"encoder_outputs": encoded, "attention_mask": mask}
    cuts = _cuts(name, written.shape[1], single_steps)
    return _in_pieces(model, written, cuts, lambda start, stop: further, "decoder_input_ids")


def _reading_mask(model: Any, read: Any) -> Any:
    """Ones at the tokens `[batch, seq]` that are no padding."""
    pad = model.config.pad_token_id
    return (read != (-1 if pad is None else pad)).long()


def _cuts(name: str, tokens: int, single_steps: int) -> list[int]:
    """Where the pieces end that a pass with a cache is made of."""
    prompt = tokens - single_steps
    chunks = [prompt * 2 // 3] if name == "cached" else []
    return [*chunks, prompt, *range(prompt + 1, tokens + 1)]


def padding_mask(ids: Any) -> Any:
    """Ones at real tokens `[batch, seq]`: row r is left-padded by r eighths, at most half."""
    import torch

    mask = torch.ones_like(ids)
    for row in range(ids.shape[0]):
        mask[row, : ids.shape[1] * min(row, 4) // 8] = 0
    return mask


def _in_pieces(
    model: Any, ids: Any, cuts: Sequence[int], further: Further, name: str = "input_ids"
) -> Any:
    """Logits of `ids`, given to the model as `name`, in pieces that end at `cuts`, with a cache."""
    import torch

    pieces, start, cache = [], 0, None
    for stop in cuts:
        piece = {name: ids[:, start:stop], **further(start, stop)}
        output = model(**piece, past_key_values=cache, use_cache=True)
        pieces.append(output.logits.cpu())
        cache, start = output.past_key_values, stop
    return torch.cat(pieces, dim=1)


def generate(model: Any, ids: Any, new_tokens: int) -> Any:
    """The tokens that greedy decoding adds to the first row of `ids`, `[1, at most new_tokens]`.

    An encoder-decoder reads the row's first half and starts with the first token of the second.

    Of the model's own settings only the ids that end and pad are used: others, such as strings to
    stop at, may need what is not here, and say nothing about its weights.
    """
    import torch
    from transformers import GenerationConfig

    own = model.generation_config
    ids_only = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
    if reads_apart(model):
        prompt, written = (half[:1] for half in halves(ids))
        mask, before = _reading_mask(model, prompt), 1
        ids_only["decoder_start_token_id"] = int(written[0, 0])
    else:
        prompt = ids[:1, : ids.shape[1] - new_tokens]
        mask, before = torch.ones_like(prompt), prompt.shape[1]
    # Settings that an argument leaves open would be taken from the model's own.
    model.generation_config = GenerationConfig(**ids_only)
    try:
        with torch.inference_mode():
            whole = model.generate(
                prompt,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
            )
    finally:
        model.generation_config = own
    return whole[:, before:].cpu()


def compare(expected: Any, found: Any, mask: Any = None) -> dict[str, float]:
    """How far two sets of logits `[batch, seq, vocab]` lie apart, at the positions of `mask`."""
    same = expected.argmax(-1) == found.argmax(-1)
    largest = (expected.float() - found.float()).abs().amax(-1)
    if mask is not None:
        same, largest = same[mask.bool()], largest[mask.bool()]
    return {
        "difference": float(largest.max()),
        "differing": int((largest != 0).sum()),
        "positions": same.numel(),
        "agreeing": int(same.sum()),
    }


def check_one(job: dict[str, Any]) -> dict[str, Any]:
    """Load one export as any user would, and compare it with what the masked model computed."""
    import torch
    from safetensors import safe_open
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    two = AutoConfig.from_pretrained(job["path"]).is_encoder_decoder
    loader: Any = AutoModelForSeq2SeqLM if two else AutoModelForCausalLM
    model, info = loader.from_pretrained(
        job["path"],
        dtype=getattr(torch, job["dtype"]),
        attn_implementation=job["attention"],
        output_loading_info=True,
    )
    model = model.to(job["device"]).eval()
    figures: dict[str, Any] = {
        "loading": sorted(name for kind in info.values() for name in map(str, kind)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    with safe_open(job["tensors"], framework="pt") as file:
        ids = file.get_tensor("ids").to(job["device"])
        for name in PASSES:
            found = run_pass(model, name, ids, job["single_steps"])
            # The padding of an encoder-decoder is in what it reads, which has no logits.
            mask = padding_mask(ids).cpu() if name == "padded" and not two else None
            figures[name] = compare(file.get_tensor(name), found, mask)
        generated = generate(model, ids, job["single_steps"])
        figures["generation_equal"] = torch.equal(file.get_tensor("generated"), generated)
    figures["tokenizer_equal"] = True
    if job["text"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(job["path"])
        figures["tokenizer_equal"] = (
            tokenizer(job["text"])["input_ids"] == job["text_ids"]
            and tokenizer.chat_template == job["chat_template"]
        )
    return figures


class _Blocker(MetaPathFinder):
    """Makes every import of depthsearch fail."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == BLOCKED:
            raise ImportError(f"{BLOCKED} must not be needed to load an export")


def main(request: Path, figures: Path) -> None:
    """Check every job of the request file and write the figures file."""
    sys.meta_path.insert(0, _Blocker())
    asked = json.loads(request.read_text(encoding="utf-8"))
    # An isolated interpreter leaves out the user's own site directory, where torch may live.
    sys.path += [entry for entry in asked["path"] if entry not in sys.path]
    import torch

    torch.set_num_threads(asked["threads"])
    found = [check_one(job) for job in asked["jobs"]]
    if any(name.partition(".")[0] == BLOCKED for name in sys.modules):
        raise ImportError(f"{BLOCKED} was imported while the exports were checked")
    figures.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
