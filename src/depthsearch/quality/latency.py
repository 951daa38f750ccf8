"""How long one decoding step takes, whole and part by part.

A step is one token through the model at batch 1, behind a KV cache of a given length, greedy choice
of the next token included. Its parts are timed where they run, in real steps, since a sublayer that
is repeated on its own finds its weights in the processor's caches.
"""

from __future__ import annotations

import copy
import inspect
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from depthsearch.errors import ModelError
from depthsearch.model.anatomy import Anatomy, context_window
from depthsearch.model.families import FamilyRow

OnSteps = Callable[[int, int], None]
"""Called with the rounds measured so far and all of them."""

_WARM_UP = 3
_ENOUGH = 5
"""Steps that no other process interrupted from which on interrupted ones are left out."""

_PREFILL_TOKENS = 1024


@dataclass(frozen=True)
class Times:
    """Nanoseconds over the repeats of one measurement: the median, and the quartiles."""

    median_ns: int
    low_ns: int
    high_ns: int

    @classmethod
    def of(cls, times_ns: Any) -> Times:
        """Summarize at least one time."""
        low, median, high = np.percentile(times_ns, (25, 50, 75))
        return cls(round(median), round(low), round(high))


@dataclass(frozen=True)
class StepTimes:
    """One decoding step of a dense model in parts.

    `sites` has one entry a site, norms and residual additions included; `shared` one a block, for
    what both sublayers of a parallel block share, and none elsewhere; `fixed` is all outside the
    blocks. `alike[i]` is the same for sites of one kind and shape. `whole` is the step measured
    without anything that watches its parts, in turns with them. `interrupted` is the share of steps
    that other processes took the processor from; they count only where fewer than five others are
    left, and then make whole steps longer than their parts.
    """

    sites: tuple[Times, ...]
    shared: tuple[Times, ...]
    fixed: Times
    whole: Times
    alike: tuple[str, ...]
    interrupted: float

    @property
    def site_costs(self) -> tuple[int, ...]:
        """Medians averaged over sites that are alike, which differ by noise alone."""
        groups: dict[str, list[int]] = {}
        for name, times in zip(self.alike, self.sites, strict=True):
            groups.setdefault(name, []).append(times.median_ns)
        return tuple(round(float(np.mean(groups[name]))) for name in self.alike)

    @property
    def shared_costs(self) -> tuple[int, ...]:
        """The same for what parallel blocks share: blocks are taken to be alike."""
        if not self.shared:
            return ()
        mean = round(float(np.mean([times.median_ns for times in self.shared])))
        return (mean,) * len(self.shared)


def measure_parts(
    model: Any,
    anatomy: Anatomy,
    context_tokens: int,
    repeats: int = 50,
    on_steps: OnSteps | None = None,
) -> StepTimes:
    """Time every part of one decoding step, and the whole step, in turns.

    Each round is one watched and one unwatched step, their order changing; a watched one times all
    sites in turn, so that heat, clock changes and neighbours hit all alike. Every step starts from
    the same cache of `context_tokens` tokens. Three rounds go first, untimed. On CUDA the marks
    between parts are events on the stream: nothing waits for them.

    Raises ModelError for a length that the model can't take, or a device other than one CPU or GPU.
    """
    row = anatomy.stack.row
    decoder = _Decoder("the model", model, context_tokens, repeats)
    blocks, marks = anatomy.stack.blocks, 3 if row.parallel else 2
    steps: dict[bool, list[list[float]]] = {True: [], False: []}
    disturbed: dict[bool, list[bool]] = {True: [], False: []}
    for turn in _rounds(repeats, on_steps):
        for watching in (turn % 2 == 0, turn % 2 == 1):
            with _watched(model, anatomy, decoder.clock) if watching else nullcontext():
                times, interrupted = decoder.step()
            steps[watching].append(times)
            disturbed[watching].append(interrupted)
            if watching and len(times) != 1 + blocks * (marks + 1):
                raise ModelError(
                    f"{anatomy.model_class}: a decoding step passed {len(times)} parts, not the "
                    f"{1 + blocks * (marks + 1)} of its {blocks} blocks; its row in "
                    "depthsearch/model/families.py does not describe it"
                )
    rounds = _undisturbed(steps[True], disturbed[True])
    # What follows each block's last part, up to the next block or the end, is outside the blocks.
    parts = rounds[:, 1:].reshape(-1, blocks, marks + 1)
    fixed = rounds[:, 0] + parts[:, :, -1].sum(axis=1)
    sublayers = parts[:, :, marks - 2 : marks].reshape(-1, 2 * blocks)
    return StepTimes(
        sites=tuple(Times.of(sublayers[:, site]) for site in range(2 * blocks)),
        shared=tuple(Times.of(parts[:, b, 0]) for b in range(blocks)) if row.parallel else (),
        fixed=Times.of(fixed),
        whole=Times.of(_undisturbed(steps[False], disturbed[False])),
        alike=tuple(_alike(model, anatomy, decoder.cache)),
        interrupted=float(np.mean([flags[_WARM_UP:] for flags in disturbed.values()])),
    )


def measure_steps(
    models: Mapping[str, Any],
    context_tokens: int,
    repeats: int = 50,
    on_steps: OnSteps | None = None,
) -> dict[str, Times]:
    """Time whole decoding steps of several models in turns; raises as `measure_parts` does."""
    decoders = {
        name: _Decoder(name, model, context_tokens, repeats) for name, model in models.items()
    }
    steps: dict[str, list[tuple[list[float], bool]]] = {name: [] for name in models}
    for turn in _rounds(repeats, on_steps):
        for name in sorted(decoders, reverse=turn % 2 == 1):
            steps[name].append(decoders[name].step())
    return {
        name: Times.of(_undisturbed(*zip(*found, strict=True))) for name, found in steps.items()
    }


def _undisturbed(times: Sequence[Sequence[float]], interrupted: Sequence[bool]) -> Any:
    """Times `[step, mark]` behind the warm-up, without interrupted ones where enough are left."""
    found = np.array(times)[_WARM_UP:]
    quiet = found[~np.array(interrupted)[_WARM_UP:]]
    return quiet if len(quiet) >= _ENOUGH else found


def _interruptions() -> int:
    """How often other processes have taken the processor from this one."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _rounds(repeats: int, on_steps: OnSteps | None) -> Iterator[int]:
    total = repeats + _WARM_UP
    for turn in range(total):
        yield turn
        if on_steps is not None:
            on_steps(turn + 1, total)


class _Decoder:
    """One model behind a filled cache, ready for the same step again and again."""

    def __init__(self, name: str, model: Any, context_tokens: int, repeats: int) -> None:
        for what, value in (("context_tokens", context_tokens), ("repeats", repeats)):
            if value < 1:
                raise ModelError(f"{what} is {value}; allowed: 1 or more")
        limit = context_window(model)
        if limit is not None and context_tokens >= limit:
            raise ModelError(
                f"{name}: a context of {context_tokens} tokens and one more exceed the model's "
                f"{limit} positions; lower context_tokens"
            )
        devices = {weight.device for weight in model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type not in ("cpu", "cuda"):
            found = ", ".join(sorted(map(str, devices)))
            raise ModelError(f"{name} is on {found}: steps are timed on one CPU or one CUDA device")
        self._model = model
        takes = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.clock = _Clock(next(iter(devices)))
        self.cache: Any = None
        self._fill(context_tokens, next(iter(devices)))

    def step(self) -> tuple[list[float], bool]:
        """Nanoseconds between the marks of one step, and whether another process interrupted it.

        One time, or one for each part while watched.
        """
        # Caches grow by new tensors, so a shallow copy leaves the filled one as it is.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        before = _interruptions()
        with torch.no_grad():
            self.clock.start()
            self._forward(self._token, cache)
            self.clock.mark()
        return self.clock.intervals(), _interruptions() > before

    def _forward(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **self._options)
        return output.logits[:, -1:].argmax(dim=-1), output.past_key_values

    def _fill(self, tokens: int, device: torch.device) -> None:
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(tokens, device=device).view(1, tokens) % vocabulary
        with torch.no_grad():
            for part in ids.split(_PREFILL_TOKENS, dim=1):
                self._token, self.cache = self._forward(part, self.cache)


class _Clock:
    """Marks in time on one device, and what lies between them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._marks: list[Any] = []

    def start(self) -> None:
        """Wait until the device is idle, forget older marks and set the first."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        self._marks = []
        self.mark()

    def mark(self, *_: Any) -> None:
        """Set a mark; takes what modules hand to their hooks."""
        if self._cuda is None:
            self._marks.append(time.perf_counter_ns())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._cuda))
        self._marks.append(event)

    def intervals(self) -> list[float]:
        """Nanoseconds between each mark and the next."""
        if self._cuda is None:
            return [float(after - before) for before, after in pairwise(self._marks)]
        torch.cuda.synchronize(self._cuda)
        return [1e6 * before.elapsed_time(after) for before, after in pairwise(self._marks)]


@contextmanager
def _watched(model: nn.Module, anatomy: Anatomy, clock: _Clock) -> Iterator[None]:
    """Set a mark where each part of each block begins and where the block ends."""
    handles = []
    try:
        for block in anatomy.block_list(model):
            for module in _beginnings(block, anatomy.stack.row):
                handles.append(module.register_forward_pre_hook(clock.mark))
            handles.append(block.register_forward_hook(clock.mark))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _beginnings(block: nn.Module, row: FamilyRow) -> tuple[nn.Module, ...]:
    """The modules whose start begins a part: attention, FFN; before them the shared norm."""
    if row.parallel:
        return block, getattr(block, row.attention), getattr(block, row.ffn)
    return block, getattr(block, row.ffn_norms[0] if row.norm_before else row.ffn)


def _alike(model: nn.Module, anatomy: Anatomy, cache: Any) -> Iterator[str]:
    """For each site its kind, the shapes of its weights and, of attentions, of what it attends."""
    row = anatomy.stack.row
    for index, block in enumerate(anatomy.block_list(model)):
        for kind, name, norms in (
            ("attention", row.attention, row.attention_norms),
            ("ffn", row.ffn, row.ffn_norms),
        ):
            weights = [
                (tuple(weight.shape), str(weight.dtype))
                for part in (name, *norms)
                for weight in getattr(block, part).parameters()
            ]
            held = tuple(cache.layers[index].keys.shape) if kind == "attention" else ()
            yield f"{kind} {weights} {held}"
