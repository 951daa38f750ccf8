"""A search whose asks depend on what other runs tell: followed on resume, not computed again.

Such a run's journal says once which member of the shared study it is (`join`), and how its asks
ended (`stop`), since neither follows from the seed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from depthsearch.run.ledger import Ledger
from depthsearch.searchers import SharedSearcher
from depthsearch.space import Batch, Mask, Proposal, Stage


def search_identity(start: Mapping[str, Any]) -> dict[str, Any]:
    """What makes losses of two runs comparable, taken from the first record of a journal."""
    signature = start.get("signature", {})
    return {
        "version": start.get("version"),
        "model": signature.get("model", {}).get("fingerprint"),
        "dtype": signature.get("dtype"),
        "text": signature.get("data", {}).get("windows"),
        "protocol": signature.get("protocol"),
        "seed": signature.get("seed"),
    }


def join(searcher: SharedSearcher, ledger: Ledger, start: Mapping[str, Any]) -> None:
    """Join the shared study, on resume as the same member."""
    record = ledger.recall("join", lambda: {"op": "join", "member": secrets.token_hex(8)})
    searcher.join(record["member"], search_identity(start))


def recorded_ask(searcher: SharedSearcher, ledger: Ledger) -> Batch | None:
    """The next ask of the journal, handed to the searcher; None where the journal ends.

    An empty one where the journal says that the search stopped there.
    """
    record = ledger.upcoming
    if record is None or record["op"] not in ("ask", "stop"):
        return None
    if record["op"] == "stop":
        return Batch(())
    batch = Batch(
        tuple(Proposal.from_json(entry) for entry in record["proposals"]),
        record["survivors"],
        tuple(Mask.from_key(key) for key in record["rivals"]),
        tuple(Stage(**stage) for stage in record.get("stages", ())),
    )
    searcher.follow(batch)
    return batch


def leave(searcher: SharedSearcher, ledger: Ledger, reason: str) -> str:
    """End the search; returns the reason why it ended, on resume the recorded one."""
    searcher.leave()
    return str(ledger.recall("stop", lambda: {"op": "stop", "reason": reason})["reason"])
