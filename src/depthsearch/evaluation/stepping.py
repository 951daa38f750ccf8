"""The steps of a model, as fine as it can be replayed, run one at a time."""

from __future__ import annotations

from torch import Tensor

from depthsearch.errors import UnsupportedModelError
from depthsearch.evaluation.accounting import width
from depthsearch.evaluation.turns import Steps, steps_of
from depthsearch.model.replay import Call, Mode, Replayer


class Stepper:
    """Runs steps of sites: single sublayers, or whole blocks where only those replay exactly.

    Raises UnsupportedModelError for a model whose blocks can't be replayed at all.
    """

    def __init__(self, replayer: Replayer, mode: Mode) -> None:
        if mode is Mode.WHOLE:
            raise UnsupportedModelError(
                f"{replayer.anatomy.model_class}: its blocks can't be replayed on their own, so it "
                "can't be repaired: set search.repair and search.finish to none"
            )
        self.replayer = replayer
        anatomy = replayer.anatomy
        self.steps: Steps = steps_of(len(anatomy.sites), width(mode), anatomy.stack_ends)

    def run(
        self, calls: tuple[Call, ...], step: int, kept: tuple[bool, ...], hidden: Tensor
    ) -> Tensor:
        """The hidden states `[batch, seq, hidden]` after one step with the sites asked for."""
        return self.replayer.run(calls, self.steps[step], kept, hidden)
