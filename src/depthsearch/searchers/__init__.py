"""Searchers: one file an algorithm, all of them `ask` / `tell`, none of them with torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, NoneType

import numpy as np

from depthsearch.errors import ConfigError
from depthsearch.searchers.additive import AdditiveOptions, additive_plan
from depthsearch.searchers.baselines import cheap_baselines, is_baseline
from depthsearch.searchers.beam import BeamOptions, beam_plan
from depthsearch.searchers.evolution import EvolutionOptions, evolution_plan
from depthsearch.searchers.evopress import EvoPressOptions, evopress_plan
from depthsearch.searchers.exact import ExhaustiveOptions, exhaustive_plan, listed
from depthsearch.searchers.fixed import FixedOptions, fixed_plan
from depthsearch.searchers.greedy import GreedyOptions, greedy_plan
from depthsearch.searchers.mcts import MctsOptions, MctsSearcher
from depthsearch.searchers.oneshot import (
    AngularWindowOptions,
    BlockInfluenceOptions,
    SimilarityOptions,
    SingleRemovalOptions,
    WindowsOptions,
    angular_window_plan,
    block_influence_plan,
    similarity_plan,
    single_removal_plan,
    windows_plan,
)
from depthsearch.searchers.options import parse_options, suggestion
from depthsearch.searchers.protocol import Searcher
from depthsearch.searchers.random import RandomOptions, random_plan
from depthsearch.searchers.staged import StagedSearcher
from depthsearch.searchers.surrogate import SurrogateOptions, surrogate_plan
from depthsearch.space import Hints, SearchSpace

Options = Mapping[str, object]
Build = Callable[[SearchSpace, Hints, np.random.Generator, Options], Searcher]


def build_searcher(
    method: str, space: SearchSpace, hints: Hints, rng: np.random.Generator, options: Options
) -> Searcher:
    """The searcher of a method; raises ConfigError for an unknown method or a wrong option."""
    if method not in SEARCHERS:
        raise _unknown(method)
    return SEARCHERS[method](space, hints, rng, options)


def check_options(method: str, options: Options) -> None:
    """Refuse what `build_searcher` would, before anything slow starts; raises ConfigError."""
    kind: type = _OPTIONS.get(method, NoneType)
    if method == "optuna":
        from depthsearch.searchers.optuna_keys import OptunaOptions

        kind = OptunaOptions
    if kind is NoneType:
        raise _unknown(method)
    parse_options(kind, method, options)


def check_storage(method: str, options: Options) -> None:
    """Refuse an Optuna search whose packages or storage are not there; raises ConfigError."""
    if method == "optuna":
        from depthsearch.searchers.optuna_keys import OptunaOptions, check_ready

        check_ready(parse_options(OptunaOptions, method, options))


def _unknown(method: str) -> ConfigError:
    return ConfigError(
        f"unknown search method '{method}'{suggestion(method, SEARCHERS)} "
        f"(methods: {', '.join(SEARCHERS)})"
    )


def _random(
    space: SearchSpace, _hints: Hints, rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(RandomOptions, "random", options)
    return StagedSearcher("random", random_plan(space, rng, chosen))


def _fixed(
    space: SearchSpace, _hints: Hints, _rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(FixedOptions, "fixed", options)
    return StagedSearcher("fixed", fixed_plan(space, chosen))


def _block_influence(
    space: SearchSpace, hints: Hints, _rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(BlockInfluenceOptions, "block_influence", options)
    return StagedSearcher("block_influence", block_influence_plan(space, hints, chosen))


def _similarity(
    space: SearchSpace, hints: Hints, _rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(SimilarityOptions, "similarity", options)
    return StagedSearcher("similarity", similarity_plan(space, hints, chosen))


def _angular_window(
    space: SearchSpace, hints: Hints, _rng: np.random.Generator, options: Options
) -> Searcher:
    parse_options(AngularWindowOptions, "angular_window", options)
    return StagedSearcher("angular_window", angular_window_plan(space, hints))


def _single_removal(
    space: SearchSpace, hints: Hints, _rng: np.random.Generator, options: Options
) -> Searcher:
    parse_options(SingleRemovalOptions, "single_removal", options)
    return StagedSearcher("single_removal", single_removal_plan(space, hints))


def _additive(
    space: SearchSpace, hints: Hints, _rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(AdditiveOptions, "additive", options)
    return StagedSearcher("additive", additive_plan(space, hints, chosen))


def _windows(
    space: SearchSpace, hints: Hints, _rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(WindowsOptions, "windows", options)
    return StagedSearcher("windows", windows_plan(space, hints, chosen))


def _greedy(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(GreedyOptions, "greedy", options)
    return StagedSearcher("greedy", greedy_plan(space, hints, rng, chosen))


def _beam(space: SearchSpace, hints: Hints, rng: np.random.Generator, options: Options) -> Searcher:
    chosen = parse_options(BeamOptions, "beam", options)
    return StagedSearcher("beam", beam_plan(space, hints, rng, chosen))


def _evolution(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(EvolutionOptions, "evolution", options)
    return StagedSearcher("evolution", evolution_plan(space, hints, rng, chosen))


def _evopress(
    space: SearchSpace, _hints: Hints, rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(EvoPressOptions, "evopress", options)
    return StagedSearcher("evopress", evopress_plan(space, rng, chosen))


def _mcts(space: SearchSpace, hints: Hints, rng: np.random.Generator, options: Options) -> Searcher:
    return MctsSearcher(space, hints, rng, parse_options(MctsOptions, "mcts", options))


def _exhaustive(
    space: SearchSpace, hints: Hints, _rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(ExhaustiveOptions, "exhaustive", options)
    # Listed here, so that a space which is too large is refused before anything is evaluated.
    masks = listed(space, hints, chosen)
    return StagedSearcher("exhaustive", exhaustive_plan(masks, chosen))


def _surrogate(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: Options
) -> Searcher:
    chosen = parse_options(SurrogateOptions, "surrogate", options)
    return StagedSearcher("surrogate", surrogate_plan(space, hints, rng, chosen))


def _optuna(
    space: SearchSpace, hints: Hints, rng: np.random.Generator, options: Options
) -> Searcher:
    # Optuna is imported only by the searches that use it.
    from depthsearch.searchers.optuna_keys import OptunaOptions, OptunaSearcher

    chosen = parse_options(OptunaOptions, "optuna", options)
    return OptunaSearcher(space, hints, rng, chosen)


_OPTIONS: Mapping[str, type] = MappingProxyType(
    {
        "random": RandomOptions,
        "fixed": FixedOptions,
        "block_influence": BlockInfluenceOptions,
        "similarity": SimilarityOptions,
        "angular_window": AngularWindowOptions,
        "single_removal": SingleRemovalOptions,
        "additive": AdditiveOptions,
        "windows": WindowsOptions,
        "greedy": GreedyOptions,
        "beam": BeamOptions,
        "evolution": EvolutionOptions,
        "evopress": EvoPressOptions,
        "mcts": MctsOptions,
        "exhaustive": ExhaustiveOptions,
        "surrogate": SurrogateOptions,
    }
)

SEARCHERS: Mapping[str, Build] = MappingProxyType(
    {
        "random": _random,
        "fixed": _fixed,
        "block_influence": _block_influence,
        "similarity": _similarity,
        "angular_window": _angular_window,
        "single_removal": _single_removal,
        "additive": _additive,
        "windows": _windows,
        "greedy": _greedy,
        "beam": _beam,
        "evolution": _evolution,
        "evopress": _evopress,
        "mcts": _mcts,
        "exhaustive": _exhaustive,
        "surrogate": _surrogate,
        "optuna": _optuna,
    }
)

__all__ = [
    "SEARCHERS",
    "Searcher",
    "build_searcher",
    "cheap_baselines",
    "check_options",
    "check_storage",
    "is_baseline",
]
