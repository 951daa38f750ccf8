"""Search which sublayers a pretrained transformer can lose, and export the smaller model.

The floors of the package, lowest first; imports only point down:

    errors, config          the exception tree; the validated run file
    space                   sites, masks, costs, budgets: what may go and what must remain
    searchers, journal      proposals (`ask` / `tell`); the append-only record of every step
    model, calibration      load, describe and mask a model; token windows and objectives
    evaluation, export, quality
                            losses of many masks; truncated checkpoints; figures of the result
    run                     the search loop, resume, comparison of arms
    report, cli             the HTML page; the commands
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
