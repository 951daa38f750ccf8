"""Look at a model: its sites, their costs, and how exactly it can be masked and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from depthsearch import __version__
from depthsearch.model.anatomy import describe
from depthsearch.model.costs import cost_table
from depthsearch.model.load import load_model
from depthsearch.model.selfcheck import self_check
from depthsearch.run.latency_table import read_latency


def inspect_model(
    source: str,
    *,
    context_tokens: int = 2048,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    latency: str | Path | None = None,
) -> dict[str, Any]:
    """Everything `depthsearch inspect` shows, as plain data; raises ModelError.

    `latency` is a table of this model; raises InputError for another file, BudgetError for one of
    another context.
    """
    table = read_latency(latency)
    loaded = load_model(source, dtype, device, revision)
    anatomy = describe(loaded.model)
    check = self_check(loaded.model, anatomy)
    costs = cost_table(loaded.model, anatomy, context_tokens)
    parallel = any(row.parallel for row in anatomy.rows)
    if table is not None:
        table.check(loaded)
        costs = table.added(costs, anatomy.sites, context_tokens)
    return {
        "version": __version__,
        "source": loaded.source,
        "fingerprint": loaded.fingerprint,
        "model_type": anatomy.model_type,
        "model_class": anatomy.model_class,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "blocks": len(anatomy.rows),
        "stacks": {stack.name: stack.blocks for stack in anatomy.stacks},
        "parallel_blocks": parallel,
        "packable": not parallel and not anatomy.encoder_blocks,
        "self_check": check.to_json(),
        "context_tokens": context_tokens,
        "totals": {
            metric: {
                "model": costs.total(metric),
                "blocks": costs.of(metric).blocks,
                "outside_blocks": costs.of(metric).fixed,
            }
            for metric in costs.metrics
        },
        "sites": [
            {"name": site.name}
            | {metric: costs.of(metric).sites[site.index] for metric in costs.metrics}
            for site in anatomy.sites
        ],
        "latency": None if table is None else table.signature,
    }
