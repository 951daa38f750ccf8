"""What searchers and the evaluator tell each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from depthsearch.space.mask import Mask


class Status(StrEnum):
    """How an evaluation ended; a failure is a status, never a NaN that sorts somewhere."""

    OK = "ok"
    ELIMINATED = "eliminated"
    NON_FINITE = "non_finite"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    FAILED = "failed"

    @property
    def has_loss(self) -> bool:
        """Whether losses exist: all sequences for OK, some for ELIMINATED."""
        return self in (Status.OK, Status.ELIMINATED)


@dataclass(frozen=True)
class Evaluation:
    """The losses of one mask, one for each calibration sequence in order; lower is better.

    An ELIMINATED mask lost the race and has the losses of the first sequences only. A failed one
    has none.
    """

    mask: Mask
    losses: tuple[float, ...]
    tokens: int
    status: Status = Status.OK

    @cached_property
    def loss(self) -> float | None:
        """The mean over sequences in nats, or None after a failure."""
        if not self.status.has_loss or not self.losses:
            return None
        return math.fsum(self.losses) / len(self.losses)

    @cached_property
    def stderr(self) -> float | None:
        """The standard error of `loss` over sequences, or None with fewer than two."""
        if self.loss is None or len(self.losses) < 2:
            return None
        mean, n = self.loss, len(self.losses)
        return math.sqrt(math.fsum((x - mean) ** 2 for x in self.losses) / (n - 1) / n)

    @property
    def order(self) -> tuple[int, float, str]:
        """A sort key: complete before eliminated before failed, then by loss, then by mask."""
        rank = {Status.OK: 0, Status.ELIMINATED: 1}.get(self.status, 2)
        return rank, (math.inf if self.loss is None else self.loss), self.mask.key

    def estimate(self, reference: Evaluation | None) -> float:
        """The loss on all sequences, infinite after a failure.

        For an ELIMINATED mask it is that of the complete `reference` plus their paired difference
        on the sequences that both have; without a reference it is the loss so far.
        """
        if self.loss is None:
            return math.inf
        if self.status is not Status.ELIMINATED or reference is None or reference.loss is None:
            return self.loss
        first = reference.losses[: len(self.losses)]
        return reference.loss + self.loss - math.fsum(first) / len(first)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "mask": self.mask.key,
            "loss": self.loss,
            "stderr": self.stderr,
            "losses": list(self.losses),
            "tokens": self.tokens,
            "status": str(self.status),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """Rebuild from `to_json`."""
        return cls(
            Mask.from_key(data["mask"]),
            tuple(float(x) for x in data["losses"]),
            int(data["tokens"]),
            Status(data["status"]),
        )


@dataclass(frozen=True)
class Proposal:
    """A mask to evaluate, where it came from, and whether it meets the budget.

    `final` is False for the intermediate masks of greedy removal, which do not meet it yet.
    """

    mask: Mask
    origin: str
    final: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"mask": self.mask.key, "origin": self.origin, "final": self.final}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proposal:
        """Rebuild from `to_json`."""
        return cls(Mask.from_key(data["mask"]), str(data["origin"]), bool(data["final"]))


@dataclass(frozen=True)
class Stage:
    """A cut: after `share` of the search text only the best `survivors` masks are judged on.

    It falls at the end of the first batch with so much text.
    """

    share: float
    survivors: int

    def to_json(self) -> dict[str, float]:
        """Plain data for JSON."""
        return {"share": self.share, "survivors": self.survivors}


@dataclass(frozen=True)
class Batch:
    """What a searcher asks for at once; no proposals means that it has finished.

    `survivors` is how many of the best must be known at full fidelity (None: all of them), so that
    a race may stop the others early. `rivals` are masks already known at full fidelity which the
    proposals must beat to be among those survivors. `stages`, by share, are cuts that are made
    whatever the losses differ by (successive halving); where races are turned off, those of a batch
    with `survivors` are turned off as well.
    """

    proposals: tuple[Proposal, ...]
    survivors: int | None = None
    rivals: tuple[Mask, ...] = ()
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Sensitivity:
    """First-order estimates of what closing the gate g of one site does to the loss L, `[sites]`.

    A gate multiplies what its site adds to the residual stream; L is the cross-entropy in nats a
    position. `signed` is the change expected by a step from g = 1 to 0, -dL/dg, averaged over
    sequences. `magnitude` is the mean over sequences of |dL/dg| (Molchanov et al., "Pruning
    Convolutional Neural Networks for Resource Efficient Inference", 2017, arXiv 1611.06440: the
    Taylor criterion, of one gate a site instead of a feature map).
    """

    signed: tuple[float, ...]
    magnitude: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"signed": list(self.signed), "magnitude": list(self.magnitude)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Rebuild from `to_json`."""
        signed, magnitude = (tuple(map(float, data[key])) for key in ("signed", "magnitude"))
        return cls(signed, magnitude)


@dataclass(frozen=True)
class Hints:
    """What the dense model tells about its sites before any mask is judged.

    Similarities, `[sites + 1, sites + 1]` each, come from one pass.

    Entry `[i][j]` compares the residual stream before site i with the one before site j (the last
    row is the stream after the last site): `cosine`, the mean cosine similarity over tokens
    (ShortGPT's block influence is one minus it), and `angular`, the mean arccos divided by pi
    ("The Unreasonable Ineffectiveness of the Deeper Layers", eq. 7). `sensitivity` is there only
    for a method that needs it.
    """

    cosine: tuple[tuple[float, ...], ...]
    angular: tuple[tuple[float, ...], ...]
    sensitivity: Sensitivity | None = None

    def influence(self, group: Sequence[int]) -> float:
        """One minus the cosine similarity across a run of neighbouring sites."""
        return 1.0 - self.cosine[min(group)][max(group) + 1]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "cosine": [list(row) for row in self.cosine],
            "angular": [list(row) for row in self.angular],
            **({"sensitivity": self.sensitivity.to_json()} if self.sensitivity else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Hints:
        """Rebuild from `to_json`."""
        return cls(
            tuple(tuple(float(x) for x in row) for row in data["cosine"]),
            tuple(tuple(float(x) for x in row) for row in data["angular"]),
            Sensitivity.from_json(data["sensitivity"]) if "sensitivity" in data else None,
        )
