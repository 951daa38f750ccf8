"""How many workers a search can feed: the dispatcher for real, workers and clock simulated.

Work is counted in sublayers: those that a unit executes (shared prefixes once), one for the head of
every mask, and the dense pass that a worker makes when it meets a batch for the first time. A unit
takes as long as its work, with a random spread. Nothing is sent anywhere and no worker dies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from depthsearch.evaluation.crew import Answer, Limits, Unit
from depthsearch.evaluation.cutting import Sheet
from depthsearch.evaluation.dispatch import Dispatcher
from depthsearch.evaluation.simulation import SimulatedCrew
from depthsearch.space import Mask, Status

BUSY = 0.95
"""The share of their time that workers must compute to count as fed."""

TOTAL = 0.8
"""The share of the ideal speed-up that they must reach to count as fed, sharing included."""

_TEXT = "text"
_FASTEST = 0.05
_SUBLAYER_S = 1e-6
"""So short that the dispatcher, which looks for the dead once a second, hardly ever does."""


@dataclass(frozen=True)
class Ask:
    """Masks that a searcher asks for at once; it waits for the answers before the next ask.

    `lasts[mask]` says after how many batches a race ends each of them; none: nothing is raced.
    """

    masks: tuple[Mask, ...]
    lasts: tuple[int, ...] | None = None

    def on(self, batch: int) -> list[Mask]:
        """Who is still evaluated on a batch."""
        if self.lasts is None:
            return list(self.masks)
        return [mask for mask, last in zip(self.masks, self.lasts, strict=True) if last > batch]


@dataclass(frozen=True)
class Efficiency:
    """What of `workers` workers' time is used: both shares from 0 to 1.

    `busy` is the share of their time in which they compute. `sharing` is the work of one worker,
    which shares everything that can be shared, over the work of all. The speed-up over one worker
    is `workers * total`.
    """

    workers: int
    busy: float
    sharing: float

    @property
    def total(self) -> float:
        """The product of both."""
        return self.busy * self.sharing


def efficiency(
    asks: Sequence[Ask],
    batches: int,
    workers: int,
    *,
    spread: float = 0.2,
    seed: int = 0,
    on_ask: Callable[[], None] | None = None,
) -> Efficiency:
    """A search of `asks`, each on `batches` batches, simulated with `workers` workers.

    `spread` is the standard deviation of a unit's time, relative to its work. `on_ask()` follows
    each ask.
    """
    work = 0

    def seconds(unit: Unit, rng: np.random.Generator) -> float:
        nonlocal work
        found = _work(unit.masks)
        work += found
        return _SUBLAYER_S * found * max(_FASTEST, 1 + spread * float(rng.standard_normal()))

    dense = len(asks[0].masks[0])
    crew = SimulatedCrew(workers, _nothing, seconds, seed=seed, record_s=_SUBLAYER_S * dense)
    dispatcher = Dispatcher(crew, Limits(unit_timeout_s=1e12), clock=crew.clock)
    dispatcher.start()
    alone = met = 0
    for ask in asks:
        for batch in range(batches):
            masks = ask.on(batch)
            if not masks:
                break
            alone += _work(masks)
            met = max(met, batch + 1)
            ahead = range(batch + 1, batches)
            dispatcher.compute(_TEXT, batch, masks, ahead, sure=ask.lasts is None)
        if on_ask is not None:
            on_ask()
    alone += dense * met
    work += dense * crew.recorded
    return Efficiency(workers, crew.busy_s / (workers * crew.now), alone / work)


def best_total(asks: Sequence[Ask], batches: int, workers: int) -> float:
    """What no dispatcher could exceed as `Efficiency.total`, even without any spread.

    A mask on a batch is not divisible, and to part the masks of a batch costs shared prefixes. An
    ask takes at least the time T in which `workers` can do its work cut into runs of at most T; the
    least such T is found by halving. Racing is not bounded by it.
    """
    alone = took = float(len(asks[0].masks[0]) * batches)
    took /= workers
    for ask in asks:
        sheet = Sheet(ask.masks)
        whole = sheet.cost(0, len(sheet.masks))
        alone += batches * whole
        low, high = max(sheet.cost(i, i + 1) for i in range(len(sheet.masks))), batches * whole
        while low < high:
            middle = (low + high) // 2
            if batches * _least_work(sheet, middle) <= workers * middle:
                high = middle
            else:
                low = middle + 1
        took += low
    return alone / (workers * took)


@dataclass(frozen=True)
class Fed:
    """How many workers a search can feed: the largest number up to which every number tried does.

    `busy` for a busy share of at least `BUSY`, `total` for a total of at least `TOTAL`; 0 where not
    even the smallest does. `tried` are the figures behind that.
    """

    busy: int
    total: int
    tried: tuple[Efficiency, ...]


def workers_fed(
    asks: Sequence[Ask],
    batches: int,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    *,
    spread: float = 0.2,
    seed: int = 0,
    on_ask: Callable[[], None] | None = None,
) -> Fed:
    """How many workers of `counts`, ascending, a search of `asks` on `batches` batches can feed.

    `on_ask()` follows each ask of each of the `counts`.
    """
    tried = tuple(
        efficiency(asks, batches, n, spread=spread, seed=seed, on_ask=on_ask) for n in counts
    )
    busy = takewhile(lambda found: found.busy >= BUSY, tried)
    total = takewhile(lambda found: found.total >= TOTAL, tried)
    return Fed(
        max((found.workers for found in busy), default=0),
        max((found.workers for found in total), default=0),
        tried,
    )


def _least_work(sheet: Sheet, most: int) -> int:
    """The least work of all masks of a sheet in runs that cost `most` or less."""
    count = len(sheet.masks)
    least = [0] * (count + 1)
    for stop in range(1, count + 1):
        least[stop] = min(
            least[start] + sheet.cost(start, stop)
            for start in range(stop)
            if sheet.cost(start, stop) <= most
        )
    return least[count]


def _work(masks: Sequence[Mask]) -> int:
    return Sheet(masks).cost(0, len(masks))


def _nothing(text: str, batch: int, mask: Mask) -> Answer:
    return Answer((0.0,), Status.OK)
