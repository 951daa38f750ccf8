"""Export a masked model as an ordinary checkpoint, and prove it before it appears."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from depthsearch import __version__
from depthsearch.errors import DepthsearchError, ExportError
from depthsearch.export.card import CardData, Figure, base_name, model_card
from depthsearch.export.native import NativePlan, plan_native
from depthsearch.export.staging import MANIFEST, check_target, require_room, set_aside, staged
from depthsearch.export.verify import Verification, verify_export
from depthsearch.export.write import copy_licences, directory_bytes, small_model, write_model
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.load import LoadedModel
from depthsearch.model.repair import Patch, patched
from depthsearch.space import Mask

_PAPERS_BYTES = 32_000_000
"""Room for the tokenizer, the card and the licences beside the weights."""


Measure = Callable[[Path], tuple[Figure, ...]]


@dataclass(frozen=True)
class ExportResult:
    """A finished export: where it is, how large, and how its check went (None: not checked).

    `unmeasured` says why it could not be measured, where it was to be and could not.
    """

    path: Path
    parameters: int
    disk_bytes: int
    files: tuple[str, ...]
    plan: NativePlan
    verification: Verification | None
    unmeasured: str | None = None


def export(
    loaded: LoadedModel,
    anatomy: Anatomy,
    mask: Mask,
    out: str | Path,
    card: CardData | None = None,
    *,
    max_shard_bytes: int | str = "5GB",
    overwrite: bool = False,
    check: bool = True,
    tokens: Tensor | None = None,
    measure: Measure | None = None,
    patches: Sequence[Patch] = (),
) -> ExportResult:
    """Write the small model to the new directory `out`, checked against the masked model.

    The directory appears only when complete; its last file is depthsearch.json. `overwrite`
    replaces an earlier export. `tokens` `[batch, seq]` are the ids for the check, as
    `verify_export` takes them, random ones by default. An export that fails its check is kept as
    `<out>.failed` or under a name that begins so. `measure` is called with the checked checkpoint
    before its card is written, and adds its figures to the card's; where it raises a
    DepthsearchError, the card goes without. `patches` are refitted weights that take the place of
    the old ones.

    Raises ExportError for a mask or model that has no native form, for a target that exists, and
    for a failed check; StorageError for a full disk.
    """
    out, card = Path(out).expanduser().absolute(), card or CardData()
    if out.is_dir():
        # A link stays one, and what it leads to is replaced.
        out = out.resolve()
    plan = plan_native(anatomy, mask)
    check_target(out, overwrite)
    source = Path(loaded.source).expanduser().resolve()
    if out.exists() and out.resolve() in (source, *source.parents):
        raise ExportError(f"{out} is the base model itself, or holds it: choose another name")
    with patched(loaded.model, anatomy, patches):
        small = small_model(loaded, anatomy, plan)
    parameters = _parameters(small)
    require_room(out, _weight_bytes(small) + _PAPERS_BYTES)
    with staged(out, overwrite) as directory:
        write_model(small, loaded, directory, max_shard_bytes)
        verification = None
        if check:
            with patched(loaded.model, anatomy, patches):
                verification = _checked(loaded, anatomy, mask, directory, out, tokens)
        copy_licences(loaded, directory)
        unmeasured = None
        if measure is not None:
            try:
                card = replace(card, figures=(*card.figures, *measure(directory)))
            except DepthsearchError as error:
                unmeasured = str(error)
        counts = (_parameters(loaded.model), parameters)
        text = model_card(
            loaded, anatomy.sites, mask, plan, card, counts, verification, title=out.name
        )
        (directory / "README.md").write_text(text, encoding="utf-8")
        manifest = _manifest(loaded, anatomy, mask, plan, card, counts, verification)
        _write_synced(directory / MANIFEST, manifest)
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    return ExportResult(
        out, parameters, directory_bytes(out), tuple(files), plan, verification, unmeasured
    )


def _checked(
    loaded: LoadedModel,
    anatomy: Anatomy,
    mask: Mask,
    directory: Path,
    out: Path,
    tokens: Tensor | None,
) -> Verification:
    """Verify `directory`; on failure keep it under another name and raise ExportError."""
    try:
        verification = verify_export(loaded, anatomy, mask, directory, tokens)
    except ExportError as error:
        raise ExportError(f"{error}; it is kept in {set_aside(directory, out)}") from error
    if not verification.passed:
        raise ExportError(
            f"the export does not equal the masked model ({verification.text}); it is kept in "
            f"{set_aside(directory, out)}"
        )
    return verification


def _manifest(
    loaded: LoadedModel,
    anatomy: Anatomy,
    mask: Mask,
    plan: NativePlan,
    card: CardData,
    parameters: tuple[int, int],
    verification: Verification | None,
) -> Mapping[str, Any]:
    return {
        "version": __version__,
        "format": "native",
        "base_model": {
            "source": base_name(loaded),
            "revision": loaded.revision,
            "fingerprint": loaded.fingerprint,
        },
        "mask": mask.key,
        "kept": [anatomy.sites[i].name for i in mask.kept],
        "dropped": [anatomy.sites[i].name for i in mask.dropped],
        "blocks": [list(pair) for pair in plan.pairs],
        "encoder_blocks": plan.encoder_blocks,
        "parameters": parameters[1],
        "dense_parameters": parameters[0],
        "budget": None if card.budget is None else card.budget.to_json(),
        "origin": card.origin,
        "repair": None if card.repair is None else dict(card.repair),
        "signature": dict(card.signature),
        "verification": None if verification is None else verification.to_json(),
    }


def _write_synced(path: Path, data: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def _weight_bytes(model: nn.Module) -> int:
    unique = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() * p.element_size() for p in unique)
