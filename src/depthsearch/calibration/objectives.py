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
        result = torch.empty((len(students), teacher.shape[0]), dtype=torch.float32)
        for chunk in _chunks(teacher.shape[0]):
            reference = logits(teacher[chunk]).float()
            normalizer = torch.logsumexp(reference, dim=-1)
            probabilities = torch.softmax(reference, dim=-1)
            # KL = sum p (z_p - z_q) - lse_p + lse_q needs no log-probabilities of the vocabulary.
            constant = torch.linalg.vecdot(probabilities, reference) - normalizer
            del reference
            for row, student in enumerate(students):
                scores = logits(student[chunk]).float()
                kl = constant - torch.linalg.vecdot(probabilities, scores)
                result[row, chunk] = (kl + torch.logsumexp(scores, dim=-1)).cpu()
        return result


class CrossEntropy:
    """Cross-entropy on the next token."""

    name = "cross_entropy"
    needs_teacher = False

    def losses(
        self, logits: Logits, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Tensor:
        result = torch.empty((len(students), targets.shape[0]), dtype=torch.float32)
        for chunk in _chunks(targets.shape[0]):
            for row, student in enumerate(students):
                scores = logits(student[chunk]).float()
                chosen = scores.gather(-1, targets[chunk].unsqueeze(-1)).squeeze(-1)
                result[row, chunk] = (torch.logsumexp(scores, dim=-1) - chosen).cpu()
        return result


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    KLDivergence.name: KLDivergence,
    CrossEntropy.name: CrossEntropy,
}


def _chunks(positions: int) -> list[slice]:
    return [
        slice(start, min(start + CHUNK_POSITIONS, positions))
        for start in range(0, positions, CHUNK_POSITIONS)
    ]
