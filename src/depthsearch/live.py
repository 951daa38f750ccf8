"""What `depthsearch watch` shows: a live view on a terminal, one line a look elsewhere.

Apart from `depthsearch.terminal` because watching needs no torch and starts at once.
"""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from depthsearch.run.watching import CompareState, RunState, Watcher, Workers

_console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
_SHOWN_QUARANTINED = 3
_RESUME = "`depthsearch resume`"
_COMPARE = "the same `depthsearch compare`"


def follow(watcher: Watcher, interval_s: float) -> None:
    """Show the state every `interval_s` seconds until the run is over.

    On a terminal in place; elsewhere a line is printed whenever it differs from the last.
    """
    state = watcher.look()
    if not _console.is_terminal:
        shown: list[str] = []
        while True:
            text = lines(state)
            if text != shown:
                show(state)
            if state.over:
                return
            shown = text
            time.sleep(interval_s)
            state = watcher.look()
    with Live(picture(state), console=_console, auto_refresh=False) as live:
        while not state.over:
            time.sleep(interval_s)
            state = watcher.look()
            live.update(picture(state), refresh=True)


def show(state: RunState | CompareState) -> None:
    """Print one state as plain lines."""
    for line in lines(state):
        _console.print(line, markup=False)


def lines(state: RunState | CompareState) -> list[str]:
    """One line for a run; for a comparison one for each of its runs."""
    if isinstance(state, RunState):
        return [f"{state.run}: {', '.join(_facts(state, _RESUME))}"]
    return [f"{run.run}: {', '.join(_facts(run, _COMPARE))}" for run in state.runs]


def picture(state: RunState | CompareState) -> RenderableType:
    """What a terminal shows: a run's figures below each other, or a table of runs."""
    if isinstance(state, RunState):
        table = Table(title=f"{state.run} · {state.phase}", show_header=False)
        for name, text in _rows(state):
            table.add_row(name, text)
        return table
    table = Table(title=f"{state.run} · {'done' if state.over else 'running'}")
    for title in ("run", "phase", "ask", "best loss", "cost", "masks", "left"):
        table.add_column(title, justify="left" if title in ("run", "phase") else "right")
    for run in state.runs:
        table.add_row(
            run.run,
            run.phase,
            str(run.asks),
            _loss(run.best_loss),
            _of(run.cost_tokens, run.cost_limit_tokens),
            _of(run.evaluations, run.max_evaluations),
            "" if run.over else _span(run.seconds_left),
        )
    stalled = [run for run in state.runs if run.phase == "stalled"]
    notes = [f"{run.run}: {_stall(run, _COMPARE)}" for run in stalled]
    return Group(table, *notes)


def _rows(state: RunState) -> list[tuple[str, str]]:
    method = "" if state.method is None else f"{state.method}, seed {state.seed}"
    rows = [
        ("method", method),
        ("ask", str(state.asks)),
        ("best loss on budget", _loss(state.best_loss)),
        *((f"· {budget}", _loss(loss)) for budget, loss in state.front_losses.items()),
        ("loss on fresh data", "" if state.finals_loss is None else _loss(state.finals_loss)),
        ("cost, tokens", _of(state.cost_tokens, state.cost_limit_tokens)),
        ("masks", _of(state.evaluations, state.max_evaluations) + _statuses(state)),
        ("speed", _speed(state)),
        ("time left", "" if state.over else _span(state.seconds_left)),
        ("last record", "" if state.over or state.quiet_s is None else _ago(state.quiet_s)),
        ("workers", _workers(state.workers)),
        ("quarantined masks", _quarantined(state.workers)),
        ("ended because", state.reason or ""),
        ("stalled", _stall(state, _RESUME) if state.phase == "stalled" else ""),
    ]
    return [(name, text) for name, text in rows if text]


def _facts(run: RunState, advice: str) -> list[str]:
    if run.phase == "waiting" or (run.phase == "failed" and run.method is None):
        return [run.phase]
    facts = [
        run.phase,
        f"ask {run.asks}",
        f"best {_loss(run.best_loss)}",
        *(f"{_loss(loss)} at {budget}" for budget, loss in run.front_losses.items()),
        "" if run.finals_loss is None else f"on fresh data {_loss(run.finals_loss)}",
        f"cost {_of(run.cost_tokens, run.cost_limit_tokens)} tokens",
        f"{_of(run.evaluations, run.max_evaluations)} masks{_statuses(run)}",
        _speed(run),
        "" if run.over or run.seconds_left is None else f"{_span(run.seconds_left)} left",
        "" if run.workers is None else f"workers: {_workers(run.workers)}",
        "" if not _quarantined(run.workers) else f"quarantined: {_quarantined(run.workers)}",
        _stall(run, advice) if run.phase == "stalled" else "",
    ]
    return [fact for fact in facts if fact]


def _loss(value: float | None) -> str:
    return "none yet" if value is None else f"{value:.4f}"


def _of(value: float, limit: float | None) -> str:
    return f"{value:,.0f}" if limit is None else f"{value:,.0f} of {limit:,.0f}"


def _statuses(run: RunState) -> str:
    counts = [f"{number} {name.replace('_', ' ')}" for name, number in run.statuses.items()]
    return f" ({', '.join(counts)})" if counts else ""


def _speed(run: RunState) -> str:
    if run.evaluations_per_s is None or run.cost_tokens_per_s is None:
        return ""
    return f"{run.evaluations_per_s:.3g} masks/s, {run.cost_tokens_per_s:,.0f} cost tokens/s"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _stall(run: RunState, advice: str) -> str:
    return f"no record for {_span(run.quiet_s)}; if its process is gone, {advice} continues it"


def _workers(workers: Workers | None) -> str:
    if workers is None:
        return ""
    states = ", ".join(f"{number} {state}" for state, number in workers.states.items()) or "none"
    units = f"{workers.units_done} units done, {workers.units_queued} queued"
    again = f", {workers.units_reissued} issued again" if workers.units_reissued else ""
    return f"{states}; {units}{again}"


def _quarantined(workers: Workers | None) -> str:
    if workers is None or not workers.quarantined:
        return ""
    keys = workers.quarantined
    more = f" and {len(keys) - _SHOWN_QUARANTINED} more" if len(keys) > _SHOWN_QUARANTINED else ""
    return f"{len(keys)} ({', '.join(keys[:_SHOWN_QUARANTINED])}{more})"
