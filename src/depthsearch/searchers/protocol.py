"""The seam between a search and everything that drives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from depthsearch.errors import InputError
from depthsearch.space import Batch, Evaluation, Mask, Proposal, SearchSpace


class Searcher(Protocol):
    """Proposes masks and learns from their losses; knows no model, files or workers.

    `ask` and `tell` alternate. The same seed and the same tells give the same asks in any process,
    which is what makes a resume a replay.
    """

    @property
    def name(self) -> str:
        """The method's public name."""
        ...

    def ask(self, n: int | None = None) -> Batch:
        """At most `n` masks to evaluate, or the natural set: a whole greedy step, a generation.

        No mask is ever proposed twice. An empty batch means that the search is finished.
        """
        ...

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The evaluations of the last ask in its order, or the first of them where it was cut."""
        ...


@runtime_checkable
class SharedSearcher(Searcher, Protocol):
    """A searcher that learns from other runs as well, so that its asks can't be computed again.

    A resumed run hands it the asks of the journal in their order instead, through `follow`.
    """

    def join(self, member: str, search: Mapping[str, Any]) -> None:
        """Begin, before the first ask, as the run `member`: a hexadecimal number of its own.

        `search` is what all runs that share must have in common, as plain data.
        """
        ...

    def follow(self, batch: Batch) -> None:
        """Take `batch` as what was asked; its evaluations are told next."""
        ...

    def leave(self) -> None:
        """End: nothing that was asked and not told will be."""
        ...


def propose(space: SearchSpace, mask: Mask, origin: str) -> Proposal:
    """A proposal that is final exactly when the mask is on budget, be it one of the front."""
    return Proposal(mask, origin, space.meets(mask))


def check_ask(n: int | None, waiting: Sequence[Proposal]) -> None:
    """Refuse an ask for no masks, or one that comes before the last was answered."""
    if n is not None and n < 1:
        raise InputError(f"a searcher is asked for at least 1 mask: got n={n}")
    if waiting:
        raise InputError(
            f"ask was called while {len(waiting)} proposals wait for their losses: call tell first"
        )


def check_tell(evaluations: Sequence[Evaluation], waiting: Sequence[Proposal]) -> None:
    """Refuse evaluations that are not those of the last ask, in its order."""
    if len(evaluations) > len(waiting):
        raise InputError(f"{len(evaluations)} evaluations were told, but {len(waiting)} were asked")
    for place, (evaluation, proposal) in enumerate(zip(evaluations, waiting, strict=False)):
        if evaluation.mask != proposal.mask:
            raise InputError(
                f"evaluation {place} is of mask {evaluation.mask.key}, but {proposal.mask.key} was "
                "asked: tell the evaluations of the last ask in its order"
            )
