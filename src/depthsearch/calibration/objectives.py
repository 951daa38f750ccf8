"""Objectives: what a masked model's hidden states are worth, in nats a position; lower is better.

No logits of the whole calibration set are ever held. The teacher's hidden states are kept (hidden
size, not vocabulary size), and logits are formed for a chunk of positions at a time, the teacher's
once for all masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]

CHUNK_POSITIONS = 256


class Objective(Protocol):
    """Compares hidden states with the dense model's, or with the targets."""

    name: str
    needs_teacher: bool

    def losses(
        self, logits: Logits, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Tensor:
        """Losses `[mask, position]` in float32.

        `students` holds one `[position, hidden]` a mask, `teacher` is the dense model's
        `[position, hidden]`, `targets` the next token ids `[position]`, and `logits` maps
        `[n, hidden]` to `[n, vocab]`.
        """
        ...


class KLDivergence:
    """KL(dense || masked) over the vocabulary, the default objective."""

    name = "kl"
    needs_teacher = True

    def losses(
        self, logits: Logits, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Tensor:
        return figures(logits, students, teacher, targets)[0]


class CrossEntropy:
    """Cross-entropy on the next token."""

    name = "cross_entropy"
    needs_teacher = False

    def losses(
        self, logits: Logits, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Tensor:
        return figures(logits, students, None, targets)[1]


def figures(
    logits: Logits, students: Sequence[Tensor], teacher: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """KL divergence and cross-entropy, each `[mask, position]`, from one set of logits.

    Arguments as in `Objective.losses`; without a teacher the KL divergence is zero.
    """
    kl = torch.zeros((len(students), targets.shape[0]), dtype=torch.float32)
    cross_entropy = torch.empty_like(kl)
    for chunk in _chunks(targets.shape[0]):
        probabilities = constant = None
        if teacher is not None:
            reference = logits(teacher[chunk]).float()
            probabilities = torch.softmax(reference, dim=-1)
            # KL = sum p (z_p - z_q) - lse_p + lse_q needs no log-probabilities of the vocabulary.
            constant = torch.linalg.vecdot(probabilities, reference)
            constant -= torch.logsumexp(reference, dim=-1)
            del reference
        for row, student in enumerate(students):
            scores = logits(student[chunk]).float()
            normalizer = torch.logsumexp(scores, dim=-1)
            if probabilities is not None:
                divergence = constant - torch.linalg.vecdot(probabilities, scores) + normalizer
                kl[row, chunk] = divergence.cpu()
            chosen = scores.gather(-1, targets[chunk].unsqueeze(-1)).squeeze(-1)
            cross_entropy[row, chunk] = (normalizer - chosen).cpu()
    return kl, cross_entropy


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    KLDivergence.name: KLDivergence,
    CrossEntropy.name: CrossEntropy,
}


def _chunks(positions: int) -> list[slice]:
    return [
        slice(start, min(start + CHUNK_POSITIONS, positions))
        for start in range(0, positions, CHUNK_POSITIONS)
    ]
