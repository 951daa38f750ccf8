"""Optuna's samplers: what each needs, and how it is set up for a few hundred trials of keys.

A proposal over 60 keys after 100 and after 300 trials takes, in seconds of one core: `tpe` 0.03 and
0.06, `qmc` and the genetic ones 0.01, `gp` 0.3 and 0.8 (and 5 once, to import what it needs). That
is little beside the evaluation of a mask, so nothing is left out of `gp`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import optuna
from optuna.trial import FrozenTrial

from depthsearch.errors import ConfigError
from depthsearch.searchers.options import at_least
from depthsearch.space import SearchSpace

Sampler = Literal["tpe", "cmaes", "gp", "qmc", "nsga2", "nsga3", "random"]

_PACKAGES = {"cmaes": ("cmaes", "cma"), "gp": ("scipy", "scipy"), "qmc": ("scipy", "scipy")}
"""By sampler: the package that only it needs, and the extra that brings it."""


@dataclass(frozen=True)
class OptunaOptions:
    """Which sampler, where the study is kept, and how many masks a batch holds.

    `sampler` is tpe, cmaes, gp (a Gaussian process), qmc (scrambled Sobol points), nsga2 or nsga3
    (genetic, with `population` trials a generation; the baselines are the first), or random.
    `storage` is an Optuna storage URL, `journal:PATH`, or null for memory. The study must not exist
    yet, or hold no result; `fresh: true` deletes one of the same name first, and `shared: true`
    joins it, so that several runs learn from each other's trials. With `baselines: false` it starts
    from the sampler's own first trials instead of the cheap baselines.

    With several budgets every sampler but `cmaes` and `gp` minimizes the loss and each cost of the
    budgets at once, and a further parameter names the budget; such a study can't be shared.
    """

    sampler: Sampler = "tpe"
    storage: str | None = None
    study_name: str = "depthsearch"
    fresh: bool = False
    shared: bool = False
    batch: int = 4
    survivors: int = 4
    population: int = 16
    baselines: bool = True

    def __post_init__(self) -> None:
        at_least(self, batch=1, survivors=1, population=2)
        if self.shared and self.storage is None:
            raise ConfigError(
                "'shared: true' needs a 'storage' that other runs can reach, such as "
                "sqlite:///study.db or postgresql+psycopg://user@host/database"
            )
        if self.shared and self.fresh:
            raise ConfigError(
                "'fresh: true' would delete the study that 'shared: true' joins: set only one of "
                "them, or choose another 'study_name'"
            )


def make_sampler(
    options: OptunaOptions, seed: int, seeds: Sequence[FrozenTrial] = ()
) -> optuna.samplers.BaseSampler:
    """The sampler of the options; CMA-ES starts from the best of the trials `seeds`.

    Raises ConfigError where its package is missing.
    """
    name = options.sampler
    need_package(name)
    with quiet():
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(
                seed=seed, warn_independent_sampling=False, source_trials=list(seeds) or None
            )
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        if name == "qmc":
            return optuna.samplers.QMCSampler(
                seed=seed, scramble=True, warn_independent_sampling=False
            )
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=options.population)
        if name == "nsga3":
            return optuna.samplers.NSGAIIISampler(seed=seed, population_size=options.population)
        return optuna.samplers.RandomSampler(seed=seed)


def check_front(options: OptunaOptions, space: SearchSpace) -> None:
    """Refuse what can't search several budgets; raises ConfigError."""
    if not space.front:
        return
    unfit = {
        "cmaes": "minimizes one number, but a front has a loss and costs",
        "gp": "takes seconds a mask to weigh a loss and costs",
    }
    if options.sampler in unfit:
        raise ConfigError(
            f"the sampler '{options.sampler}' {unfit[options.sampler]}: choose nsga2, nsga3, tpe, "
            "qmc or random, or leave out the section front"
        )
    if options.shared:
        raise ConfigError(
            "a study over several budgets can't be shared: leave out 'shared: true', or the "
            "section front"
        )


def need_package(sampler: str) -> None:
    """Raise ConfigError where the package that only this sampler needs is missing."""
    package, extra = _PACKAGES.get(sampler, (None, None))
    if package is not None and find_spec(package) is None:
        raise ConfigError(
            f"the sampler '{sampler}' needs the package {package}: pip install depthsearch[{extra}]"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's log lines and its notes on experimental samplers off the terminal."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
