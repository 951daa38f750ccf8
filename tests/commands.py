"""Commands run in this process, as a person calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line that an error consists of."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("depthsearch: ")
        assert self.out == ""
        return lines[0].removeprefix("depthsearch: ")


Cli = Callable[..., Result]
