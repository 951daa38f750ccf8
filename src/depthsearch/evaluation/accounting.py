"""What evaluating masks costs, in `cost_tokens`: the same figures for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from depthsearch.evaluation.prefix import executed_sites
from depthsearch.evaluation.turns import Repair
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.costs import cost_table, head_flops
from depthsearch.model.replay import Mode
from depthsearch.space import Mask


@dataclass(frozen=True)
class Accounting:
    """FLOPs of the parts of one model for one token, and what is executed for a set of masks.

    One cost_token is the FLOPs of one token through all sites and the head. `looked_at` are the
    positions of each sequence that the head runs for. Masks that are repaired share less.

    With an encoder-decoder a token is one read and one written, `stack_ends` are the first sites
    behind its stacks.
    """

    site_flops: tuple[int, ...]
    head_flops: int
    window_tokens: int
    looked_at: int
    needs_teacher: bool
    mode: Mode
    repair: Repair = "none"
    stack_ends: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        anatomy: Anatomy,
        *,
        window_tokens: int,
        looked_at: int,
        needs_teacher: bool,
        mode: Mode,
    ) -> Accounting:
        """The accounting of `model`, whose weights may be on the meta device."""
        sites = cost_table(model, anatomy, window_tokens).of("flops").sites
        return cls(
            tuple(sites),
            head_flops(model),
            window_tokens,
            looked_at,
            needs_teacher,
            mode,
            stack_ends=anatomy.stack_ends,
        )

    @property
    def dense_flops(self) -> int:
        """FLOPs of one token through the dense model."""
        return sum(self.site_flops) + self.head_flops

    def preparation(self, sequences: int) -> float:
        """The dense pass that records `sequences` sequences; it needs no head."""
        return self.body(sequences * self.window_tokens)

    def body(self, tokens: int) -> float:
        """A dense pass over `tokens` tokens without the head."""
        return tokens * sum(self.site_flops) / self.dense_flops

    def executed(self, masks: Sequence[Mask]) -> list[int]:
        """How often each site is run for these masks, at least one."""
        if self.mode is Mode.WHOLE:
            return [sum(mask.keep[i] for mask in masks) for i in range(len(masks[0]))]
        return executed_sites(masks, width(self.mode), self.repair, self.stack_ends)

    def unit(self, executed: Sequence[int], masks: int, sequences: int) -> float:
        """One unit: `executed[site]` runs of each site, and the heads of `masks` masks."""
        body = sum(n * cost for n, cost in zip(executed, self.site_flops, strict=True))
        heads = (masks + self.needs_teacher) * self.looked_at * sequences
        flops = body * sequences * self.window_tokens + heads * self.head_flops
        return flops / self.dense_flops

    def leaning(self, tokens: int) -> float:
        """Gradients of the cross-entropy along the recorded dense stream of `tokens` tokens.

        As in `gradients`; the head runs once each way at every position.
        """
        body = 2 * sum(self.site_flops) + sum(self.site_flops[::2])
        return tokens * (body + 2 * self.head_flops) / self.dense_flops

    def written(self, mask: Mask, prompt_tokens: int, passes: int) -> float:
        """One sequence that `mask` writes after a prompt: the last token is not put through.

        An encoder-decoder reads the prompt in its encoder alone, and puts a first token through.
        """
        if len(self.stack_ends) > 1:
            read, through = (
                sum(n for kept, n in parts if kept)
                for parts in self._by_stack(mask.keep, self.site_flops)
            )
            flops = prompt_tokens * read + passes * (through + self.head_flops)
            return flops / self.dense_flops
        body = sum(cost for kept, cost in zip(mask.keep, self.site_flops, strict=True) if kept)
        flops = (prompt_tokens + passes - 1) * body + passes * self.head_flops
        return flops / self.dense_flops

    def _by_stack(
        self, keep: Sequence[bool], flops: Sequence[int]
    ) -> tuple[list[tuple[bool, int]], ...]:
        both = list(zip(keep, flops, strict=True))
        return tuple(both[a:b] for a, b in pairwise((0, *self.stack_ends)))

    def plan(self, masks: Sequence[Mask], sequences: Sequence[int]) -> float:
        """`masks` on batches of so many `sequences`."""
        if not masks:
            return 0.0
        executed = self.executed(masks)
        return sum(self.unit(executed, len(masks), count) for count in sequences)

    def hints(self, tokens: int) -> float:
        """The dense residual stream of `tokens` tokens: inside the blocks attention runs twice."""
        if len(self.stack_ends) > 1:
            return self.body(tokens)
        return tokens * (sum(self.site_flops) + sum(self.site_flops[::2])) / self.dense_flops

    def gradients(self, sequences: int) -> float:
        """Gradients of gates on `sequences` sequences: blocks run twice (the last once), and back.

        Without gradients of weights a product with a weight costs backwards what it does forwards;
        one of two activations costs twice that, so attention counts twice there, which is somewhat
        too much. The head runs once each way, at the positions looked at.
        """
        body = 3 * sum(self.site_flops) - sum(self.site_flops[-2:]) + sum(self.site_flops[::2])
        head = 2 * self.looked_at * sequences * self.head_flops
        return (body * sequences * self.window_tokens + head) / self.dense_flops


def width(mode: Mode) -> int:
    """Neighbouring sites that are run at once in `mode`."""
    return 1 if mode is Mode.SITE else 2
