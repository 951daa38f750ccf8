"""Searchers: one file an algorithm, all of them `ask` / `tell`, none of them with torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthsearch.errors import ConfigError
from depthsearch.searchers.additive import AdditiveOptions, additive_plan
from depthsearch.searchers.baselines import cheap_baselines, is_baseline
from depthsearch.searchers.beam import BeamOptions, beam_plan
from depthsearch.searchers.evolution import EvolutionOptions, evolution_plan
from depthsearch.searchers.evopress import EvoPressOptions, evopress_plan
from depthsearch.searchers.exact import (
    ExhaustiveOptions,
    every_mask,
    exhaustive_plan,
    listed,
)
from depthsearch.searchers.fixed import FixedOptions, fixed_plan
from depthsearch.searchers.front import FrontOptions, front_plan
from depthsearch.searchers.greedy import GreedyOptions, greedy_plan
from depthsearch.searchers.mcts import MctsOptions, MctsSearcher
from depthsearch.searchers.oneshot import (
    AngularWindowOptions,
    BlockInfluenceOptions,
    SensitivityOptions,
    SimilarityOptions,
    SingleRemovalOptions,
    WindowsOptions,
    angular_window_plan,
    block_influence_plan,
    sensitivity_plan,
    similarity_plan,
    single_removal_plan,
    windows_plan,
)
from depthsearch.searchers.options import parse_options, suggestion
from depthsearch.searchers.protocol import Searcher, SharedSearcher
from depthsearch.searchers.random import RandomOptions, random_plan
from depthsearch.searchers.staged import Plan, StagedSearcher
from depthsearch.searchers.surrogate import SurrogateOptions, surrogate_plan
from depthsearch.space import Hints, SearchSpace

Options = Mapping[str, object]


def build_searcher(
    method: str,
    space: SearchSpace,
    hints: Hints,
    rng: np.random.Generator,
    options: Options,
    run: str = "",
    *,
    resumed: bool = False,
) -> Searcher:
    """The searcher of a method; raises ConfigError for an unknown method or a wrong option.

    `run` names the run in a storage of the searcher's own. One that is `resumed` builds up again
    what it left there, and raises ConfigError where that is another run's by now.
    """
    found = _method(method, run, resumed)
    built = found.build(space, hints, rng, parse_options(found.options, method, options))
    return StagedSearcher(method, built) if isinstance(built, Generator) else built


def check_options(method: str, options: Options) -> None:
    """Refuse what `build_searcher` would, before anything slow starts; raises ConfigError."""
    parse_options(_method(method).options, method, options)


def check_space(method: str, options: Options, space: SearchSpace) -> None:
    """Refuse a space that is too large for its method, or has no window; raises ConfigError."""
    if method == "exhaustive":
        every_mask(space, parse_options(ExhaustiveOptions, method, options))
    if method in ("windows", "angular_window") and not any(p.windows() for p in space.points):
        raise ConfigError(
            f"no contiguous window frees enough for {space.budget.text}: protect fewer sites, keep "
            "more, or take another search.method"
        )


def needs_sensitivity(method: str) -> bool:
    """Whether the hints of a method must hold `sensitivity`; raises ConfigError for no method."""
    return _method(method).sensitivity


def needs_limit(method: str) -> bool:
    """Whether a method goes on for as long as it may; raises ConfigError for no method.

    It ends by itself only where the space is small enough to be searched whole.
    """
    return _method(method).endless


def offers_baselines(method: str) -> bool:
    """Whether to expect cheap baselines of a method; raises ConfigError for no method.

    Only where partial masks come first does it matter before its proposals tell.
    """
    return _method(method).baselines


def check_storage(
    method: str,
    options: Options,
    space: SearchSpace | None = None,
    search: Mapping[str, Any] | None = None,
) -> None:
    """Refuse an Optuna search whose packages or storage are not there; raises ConfigError.

    With `space` also a sampler that can't search its budgets, and with `search` (what
    `SharedSearcher.join` gets) a study of another search.
    """
    if method == "optuna":
        from depthsearch.searchers.optuna_samplers import OptunaOptions, check_front
        from depthsearch.searchers.optuna_storage import check_ready, identity

        wanted = None if space is None or search is None else identity(space, search)
        parsed = parse_options(OptunaOptions, method, options)
        if space is not None:
            check_front(parsed, space)
        check_ready(parsed, wanted)


@dataclass(frozen=True)
class Method:
    """The options of a method, and what builds its searcher from them once they are parsed.

    `sensitivity` says that its hints must hold one, `endless` that only a limit ends it,
    `baselines` is False where no baseline is ever among its proposals and partial masks come first.
    """

    options: type
    build: Callable[[SearchSpace, Hints, np.random.Generator, Any], Searcher | Plan]
    sensitivity: bool = False
    endless: bool = False
    baselines: bool = True


_METHODS: Mapping[str, Method] = {
    "random": Method(
        RandomOptions, lambda space, _, rng, o: random_plan(space, rng, o), endless=True
    ),
    "fixed": Method(FixedOptions, lambda space, _, __, o: fixed_plan(space, o)),
    "block_influence": Method(
        BlockInfluenceOptions, lambda space, hints, _, o: block_influence_plan(space, hints, o)
    ),
    "similarity": Method(
        SimilarityOptions, lambda space, hints, _, o: similarity_plan(space, hints, o)
    ),
    "sensitivity": Method(
        SensitivityOptions,
        lambda space, hints, _, o: sensitivity_plan(space, hints, o),
        sensitivity=True,
    ),
    "angular_window": Method(
        AngularWindowOptions, lambda space, hints, *_: angular_window_plan(space, hints)
    ),
    "single_removal": Method(
        SingleRemovalOptions, lambda space, hints, *_: single_removal_plan(space, hints)
    ),
    "additive": Method(AdditiveOptions, lambda space, hints, _, o: additive_plan(space, hints, o)),
    "windows": Method(WindowsOptions, lambda space, hints, _, o: windows_plan(space, hints, o)),
    "greedy": Method(GreedyOptions, greedy_plan, baselines=False),
    "beam": Method(BeamOptions, beam_plan, baselines=False),
    "evolution": Method(EvolutionOptions, evolution_plan, endless=True),
    "front": Method(FrontOptions, front_plan, endless=True),
    "evopress": Method(EvoPressOptions, evopress_plan),
    "mcts": Method(MctsOptions, MctsSearcher, endless=True),
    "exhaustive": Method(
        ExhaustiveOptions, lambda space, hints, _, o: exhaustive_plan(listed(space, hints, o), o)
    ),
    "surrogate": Method(SurrogateOptions, surrogate_plan, endless=True),
}

SEARCHERS = (*_METHODS, "optuna")
"""The names of all methods."""


def _method(name: str, run: str = "", resumed: bool = False) -> Method:
    if name == "optuna":
        # Optuna is imported only by the searches that use it.
        from depthsearch.searchers.optuna_keys import OptunaSearcher
        from depthsearch.searchers.optuna_samplers import OptunaOptions
        from depthsearch.searchers.optuna_shared import SharedOptunaSearcher

        def build(
            space: SearchSpace, hints: Hints, rng: np.random.Generator, options: OptunaOptions
        ) -> Searcher:
            if options.shared:
                return SharedOptunaSearcher(space, hints, rng, options)
            return OptunaSearcher(space, hints, rng, options, run=run, resumed=resumed)

        return Method(OptunaOptions, build, endless=True)
    if name not in _METHODS:
        raise ConfigError(
            f"unknown search method '{name}'{suggestion(name, SEARCHERS)} "
            f"(methods: {', '.join(SEARCHERS)})"
        )
    return _METHODS[name]


__all__ = [
    "SEARCHERS",
    "Searcher",
    "SharedSearcher",
    "build_searcher",
    "cheap_baselines",
    "check_options",
    "check_space",
    "check_storage",
    "is_baseline",
    "needs_limit",
    "needs_sensitivity",
    "offers_baselines",
]
