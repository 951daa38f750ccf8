"""Gradients with respect to gates, one on what each sublayer adds to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from depthsearch.model.families import FamilyRow
from depthsearch.model.replay import Recording, Replayer


def gate_gradients(replayer: Replayer, recording: Recording, gradient: Tensor) -> Tensor:
    """dL/dg `[site, sequence]` in float64, at g = 1, for a gate on each sublayer of each sequence.

    A gate multiplies what its sublayer adds to the residual stream, behind the norm where one
    stands there. `gradient` `[batch, seq, hidden]` is that of L with respect to what leaves the
    last block. Blocks are run again from the last to the first, so that one at a time keeps what
    its gradient needs; besides, one hidden state a block is held. No weight gets a gradient.
    """
    blocks = replayer.anatomy.block_list(replayer.model)
    states = [recording.first]
    for index in range(len(blocks) - 1):
        states.append(replayer.step(recording, index, states[-1], attention=True, ffn=True))
    found: list[Tensor] = []
    for index in reversed(range(len(blocks))):
        gradient, gates = _through(replayer, recording, index, states.pop(), gradient)
        found = [*gates, *found]
    return torch.stack(found)


def _through(
    replayer: Replayer, recording: Recording, index: int, state: Tensor, gradient: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """What `gradient` becomes before one block, and the gradients `[sequence]` of its two gates."""
    block = replayer.anatomy.block_list(replayer.model)[index]
    args, kwargs = recording.calls[index]
    added: dict[nn.Module, Tensor] = {}

    def after(module: nn.Module, _: Any, output: Any) -> None:
        added[module] = output[0] if isinstance(output, tuple) else output

    writers = [block.get_submodule(name) for name in _writers(replayer.anatomy.stack.row)]
    hooks = [writer.register_forward_hook(after) for writer in writers]
    try:
        with torch.enable_grad():
            entered = state.detach().requires_grad_()
            output = block(entered, *args, **kwargs)
            left: Tensor = output[0] if isinstance(output, tuple) else output
            parts = [added[writer] for writer in writers]
            before, *of_parts = torch.autograd.grad(
                left, [entered, *parts], gradient.to(left.device)
            )
    finally:
        for hook in hooks:
            hook.remove()
    # The derivative by a factor of a part is the part times the gradient that arrives at it.
    gates = [
        (own.double() * part.detach().double()).sum((1, 2)).cpu()
        for own, part in zip(of_parts, parts, strict=True)
    ]
    return before, gates


def _writers(row: FamilyRow) -> tuple[str, str]:
    """The children of a block whose outputs are added to the stream: attention's and the FFN's."""
    if row.norm_after:
        return row.attention_norms[-1], row.ffn_norms[-1]
    return row.attention, row.ffn
