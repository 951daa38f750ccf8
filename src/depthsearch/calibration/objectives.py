"""Objectives: what a masked model's hidden states are worth at a position; lower is better.

No logits of the whole calibration set are ever held. The teacher's hidden states are kept (hidden
size, not vocabulary size), and logits are formed for a chunk of positions at a time, the teacher's
once for all masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]

CHUNK_POSITIONS = 256
CACHED_ROWS = 4


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
            normalizer, agreement = _normalizer_and_agreement(scores, probabilities)
            if constant is not None and agreement is not None:
                kl[row, chunk] = (constant - agreement + normalizer).cpu()
            chosen = scores.gather(-1, targets[chunk].unsqueeze(-1)).squeeze(-1)
            cross_entropy[row, chunk] = (normalizer - chosen).cpu()
    return kl, cross_entropy


def _normalizer_and_agreement(
    scores: Tensor, probabilities: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The log of the summed exponentials of logits `[n, vocab]`, and their mean under the teacher.

    Each `[n]`. Both go through the same few rows before the next ones are looked at: rows of a
    large vocabulary leave the processor's cache soon.
    """
    on_cpu = scores.device.type == "cpu"
    rows = max(CACHED_ROWS, torch.get_num_threads()) if on_cpu else max(1, len(scores))
    normalizer = scores.new_empty(len(scores))
    agreement = None if probabilities is None else torch.empty_like(normalizer)
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        normalizer[part] = torch.logsumexp(scores[part], dim=-1)
        if probabilities is not None and agreement is not None:
            agreement[part] = torch.linalg.vecdot(probabilities[part], scores[part])
    return normalizer, agreement


def cross_entropy_gradient(logits: Logits, hidden: Tensor, targets: Tensor) -> Tensor:
    """The gradient `[position, hidden]` of each position's cross-entropy by its hidden state.

    `logits` must be differentiable; `hidden` is `[position, hidden]`, `targets` `[position]`.
    """
    found = torch.empty_like(hidden)
    for chunk in _chunks(targets.shape[0]):
        with torch.enable_grad():
            state = hidden[chunk].detach().requires_grad_()
            scores = logits(state).float()
            loss = torch.nn.functional.cross_entropy(scores, targets[chunk], reduction="sum")
            (found[chunk],) = torch.autograd.grad(loss, [state])
    return found


class AngularDistance:
    """The angle between the logits of the dense and of the masked model, over pi: in [0, 1].

    An objective of FinerCut (arXiv 2405.18218). The output that it compares is the logits, as in
    the paper's published code, not the last hidden states. The angle is 2 atan2(|u - v|, |u + v|)
    of the unit vectors, which is the arccos of their cosine without its rounding at small angles.
    """

    name = "angular"
    needs_teacher = True

    def losses(
        self, logits: Logits, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Tensor:
        return _distances(logits, students, teacher, _unit, _angle)


class LogitDistance:
    """The Euclidean norm of the difference between the logits of the dense and the masked model.

    An objective of FinerCut (arXiv 2405.18218), in units of logits, not in nats. Its published code
    takes one norm over all positions of a sequence; this is one a position, averaged afterwards.
    """

    name = "norm"
    needs_teacher = True

    def losses(
        self, logits: Logits, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Tensor:
        return _distances(logits, students, teacher, _as_is, _euclidean)


class JensenShannon:
    """Jensen-Shannon divergence between the next-token distributions, in nats: in [0, ln 2].

    An objective of FinerCut (arXiv 2405.18218), as commonly defined: half of KL(P || M) plus half
    of KL(Q || M), where M is the mean of both distributions.
    """

    name = "js"
    needs_teacher = True

    def losses(
        self, logits: Logits, students: Sequence[Tensor], teacher: Tensor, targets: Tensor
    ) -> Tensor:
        return _distances(logits, students, teacher, _log_probabilities, _jensen_shannon)


def _distances(
    logits: Logits,
    students: Sequence[Tensor],
    teacher: Tensor,
    view: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`distance` `[mask, position]` between what `view` makes of the teacher's logits and theirs.

    Views and distances work position by position on float32 `[n, vocab]`.
    """
    found = torch.empty((len(students), teacher.shape[0]), dtype=torch.float32)
    for chunk in _chunks(teacher.shape[0]):
        reference = view(logits(teacher[chunk]).float())
        for row, student in enumerate(students):
            found[row, chunk] = distance(reference, view(logits(student[chunk]).float())).cpu()
    return found


def _as_is(scores: Tensor) -> Tensor:
    return scores


def _unit(scores: Tensor) -> Tensor:
    return torch.nn.functional.normalize(scores, dim=-1)


def _log_probabilities(scores: Tensor) -> Tensor:
    return torch.log_softmax(scores, dim=-1)


def _euclidean(a: Tensor, b: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(a - b, dim=-1)
    return length


def _angle(a: Tensor, b: Tensor) -> Tensor:
    return torch.atan2(_euclidean(a, b), _euclidean(a, -b)).mul_(2 / math.pi)


def _jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    middle = torch.logaddexp(a, b).sub_(math.log(2))
    both: Tensor = sum(torch.linalg.vecdot(side.exp(), side - middle) for side in (a, b))
    # Rounding may leave a trace below zero where both distributions are one.
    return both.div_(2).clamp_(min=0)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    made.name: made
    for made in (KLDivergence, CrossEntropy, AngularDistance, LogitDistance, JensenShannon)
}


def _chunks(positions: int) -> list[slice]:
    return [
        slice(start, min(start + CHUNK_POSITIONS, positions))
        for start in range(0, positions, CHUNK_POSITIONS)
    ]
