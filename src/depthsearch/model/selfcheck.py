"""The check every model passes at load: masking means what it says, and replay is exact.

Compares, on a few random tokens of the real model, (a) a dropped sublayer with one whose output
projection's weights are zero, (b) a dropped block with one that is passed through, and (c) replayed
blocks with an ordinary masked forward pass. The weights are restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from depthsearch.errors import UnsupportedModelError
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.replay import Mode, Recording, Replayer
from depthsearch.model.switches import replaced_blocks, through_view, without_norms
from depthsearch.space import Mask, Site


@dataclass(frozen=True)
class SelfCheck:
    """What the check found: the finest exact replay, and its largest difference (0.0 = exact)."""

    mode: Mode
    sites_checked: tuple[str, ...]
    replay_difference: float

    def to_json(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "mode": str(self.mode),
            "sites_checked": list(self.sites_checked),
            "replay_difference": self.replay_difference,
        }


def self_check(model: nn.Module, anatomy: Anatomy, tokens: int = 24) -> SelfCheck:
    """Check masking and replay on `[2, tokens]` random ids.

    Raises UnsupportedModelError where masking is not what zero weights do. Where replay is not
    exact the mode is coarser, at worst whole masked forward passes.
    """
    _check_format(model, anatomy)
    replayer = Replayer(model, anatomy)
    rng = np.random.default_rng(0)
    # Of an encoder-decoder this may well be one of its two stacks.
    vocab = int(getattr(model, "config").get_text_config().vocab_size)
    ids = torch.from_numpy(rng.integers(0, vocab, size=(2, tokens))).to(_device(model))
    recording = replayer.record(ids)
    sites = _sample(anatomy)
    for site in sites:
        _check_masking(replayer, recording, site)
    _check_removal(replayer, recording)
    mode, difference = _exact_mode(replayer, recording, rng)
    return SelfCheck(mode, tuple(site.name for site in sites), difference)


def _check_format(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse float16 beside float32 (T5): the stream's format would depend on what is dropped."""
    formats = {parameter.dtype for parameter in model.parameters()}
    if {torch.float16, torch.float32} <= formats:
        raise UnsupportedModelError(
            f"{anatomy.model_class} keeps some of its weights in float32 beside float16: set "
            "model.dtype to bfloat16 or float32"
        )


def _sample(anatomy: Anatomy) -> tuple[Site, ...]:
    blocks: dict[int, None] = {}
    start = 0
    for stack in anatomy.stacks:
        last = stack.blocks - 1
        blocks |= dict.fromkeys((start, start + last // 2, start + last))
        start += stack.blocks
    return tuple(site for block in blocks for site in anatomy.sites_of(block))


def _check_masking(replayer: Replayer, recording: Recording, site: Site) -> None:
    anatomy, number = replayer.anatomy, replayer.anatomy.block_of(site)
    block, row = anatomy.block_list(replayer.model)[number], anatomy.rows[number]
    path = row.projection(site.kind)
    dropped = replayer.whole(recording, Mask.dropping(len(anatomy.sites), [site.index]))
    views = list(anatomy.block_list(replayer.model))
    if row.post_norm:
        # What stands behind the addition goes with the sublayer, and zeros would still pass it.
        views[number] = without_norms(block, row, site.kind)
    with (
        _zeroed(block.get_submodule(path)),
        replaced_blocks(replayer.model, anatomy, views),
    ):
        zeroed = replayer.whole(recording, Mask.dense(len(anatomy.sites)))
    if not torch.equal(dropped, zeroed):
        raise UnsupportedModelError(
            f"{anatomy.model_class}: dropping {site.name} differs by "
            f"{_difference(dropped, zeroed):.2e} from zeroing '{path}', so its row in "
            "depthsearch/model/families.py does not describe this model"
        )


def _check_removal(replayer: Replayer, recording: Recording) -> None:
    anatomy, start = replayer.anatomy, 0
    for stack in anatomy.stacks:
        middle = start + stack.blocks // 2
        start += stack.blocks
        sites = anatomy.sites_of(middle)
        mask = Mask.dropping(len(anatomy.sites), [site.index for site in sites])
        dropped = replayer.whole(recording, mask)
        views = list(anatomy.block_list(replayer.model))
        views[middle] = through_view(views[middle], row=stack.row)
        with replaced_blocks(replayer.model, anatomy, views):
            passed = replayer.whole(recording, Mask.dense(len(anatomy.sites)))
        if not torch.equal(dropped, passed):
            raise UnsupportedModelError(
                f"{anatomy.model_class}: dropping all sublayers of {stack.name} block "
                f"{sites[0].block} differs by {_difference(dropped, passed):.2e} from removing the "
                "block: the block does more than its attention and FFN"
            )


def _exact_mode(
    replayer: Replayer, recording: Recording, rng: np.random.Generator
) -> tuple[Mode, float]:
    sites = len(replayer.anatomy.sites)
    masks = [Mask.dense(sites)]
    for _ in range(3):
        masks.append(Mask(tuple(bool(k) for k in rng.random(sites) < 0.7)))
    expected = [replayer.whole(recording, mask) for mask in masks]
    difference = 0.0
    for mode in (Mode.SITE, Mode.BLOCK):
        parallel = any(row.parallel for row in replayer.anatomy.rows)
        if parallel if mode is Mode.SITE else replayer.anatomy.encoder_blocks > 0:
            continue
        replayed = [replay(replayer, recording, mask, mode) for mask in masks]
        if all(torch.equal(a, b) for a, b in zip(expected, replayed, strict=True)):
            return mode, 0.0
        difference = max(_difference(a, b) for a, b in zip(expected, replayed, strict=True))
    return Mode.WHOLE, difference


def replay(replayer: Replayer, recording: Recording, mask: Mask, mode: Mode) -> Tensor:
    """The hidden states after the last block `[batch, seq, hidden]` of one mask, replayed."""
    if mode is Mode.WHOLE:
        return replayer.whole(recording, mask)
    hidden = recording.first
    for block in range(len(replayer.anatomy.rows)):
        sites = [site.index for site in replayer.anatomy.sites_of(block)]
        for step in [(site,) for site in sites] if mode is Mode.SITE else [tuple(sites)]:
            kept = [mask.keep[site] for site in step]
            hidden = replayer.run(recording.calls, step, kept, hidden)
    return hidden.to(recording.last.device)


@contextmanager
def _zeroed(module: nn.Module) -> Iterator[None]:
    saved = [(p, p.detach().clone()) for p in module.parameters()]
    try:
        with torch.no_grad():
            for parameter, _ in saved:
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
