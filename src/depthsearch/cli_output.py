"""How commands show what they found, and how they end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer


class Ended(SystemExit):
    """The end of the process, its one line already written."""


def fail(message: str, code: int) -> None:
    """End the process with one line on standard error."""
    sys.stderr.write(f"depthsearch: {message}\n")
    sys.stderr.flush()
    raise Ended(code)


def present(data: Any, as_json: bool, lines: Any) -> None:
    """Print `lines(data)`, or the data itself as one JSON document."""
    from depthsearch.terminal import results

    if as_json:
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    for line in lines(data):
        results.print(line)


def say(text: str, quiet_please: bool = False) -> None:
    """Print one line, unless a JSON document is all that is wanted."""
    from depthsearch.terminal import results

    if not quiet_please:
        results.print(text)


def finished(run: Path) -> None:
    """Print the result of a run that has ended."""
    from depthsearch.run.directory import BEST, FRONT, REPORT, read_json
    from depthsearch.tables import best_table, front_table
    from depthsearch.terminal import results

    results.print(best_table(read_json(run / BEST, "the run has not finished")))
    if (run / FRONT).is_file():
        results.print(front_table(read_json(run / FRONT, "the run has not finished")))
    results.print(f"Report: {run / REPORT}")
