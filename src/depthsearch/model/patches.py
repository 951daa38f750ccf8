"""Refitted weights on disk: one safetensors file beside the result of a search."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from depthsearch.errors import RunDirectoryError, StorageError
from depthsearch.model.anatomy import Anatomy
from depthsearch.model.repair import Patch, projection_of
from depthsearch.sources import one_line
from depthsearch.space import Mask


def save_patches(path: Path, patches: Sequence[Patch], anatomy: Anatomy, mask: Mask) -> str:
    """Write the whole file or nothing; returns its sha256. Raises StorageError (disk full)."""
    tensors = {}
    about = {}
    for patch in patches:
        name = anatomy.sites[patch.site].name
        tensors[f"{name}.weight"] = patch.weight.contiguous().cpu()
        if patch.bias is not None:
            tensors[f"{name}.bias"] = patch.bias.contiguous().cpu()
        if patch.norm is not None:
            tensors[f"{name}.norm"] = patch.norm.contiguous().cpu()
        about[name] = {"ridge": patch.ridge, "left": patch.left}
    # One entry only: the library writes several in an order of its own.
    metadata = {"depthsearch": json.dumps({"format": 1, "mask": mask.key, "sites": about})}
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {one_line(error)}") from error
    return file_digest(path)


def load_patches(
    path: Path, model: nn.Module, anatomy: Anatomy, mask: Mask, sha256: str
) -> tuple[Patch, ...]:
    """The refitted weights of `mask`, in the number format of `model`.

    Raises RunDirectoryError where the file is missing, damaged, or belongs to another mask or
    number format.
    """
    try:
        if file_digest(path) != sha256:
            raise RunDirectoryError(
                f"{path} is not the file that the search wrote (its sha256 differs): restore it, "
                "or search again"
            )
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("depthsearch", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"{path} can't be read: {one_line(error)}") from error
    if about.get("format") != 1 or about.get("mask") != mask.key:
        raise RunDirectoryError(f"{path} holds the repair of another mask: search again")
    numbers = {site.name: site.index for site in anatomy.sites}
    patches = tuple(
        Patch(
            numbers[name],
            tensors[f"{name}.weight"],
            tensors.get(f"{name}.bias"),
            entry["ridge"],
            entry["left"],
            tensors.get(f"{name}.norm"),
        )
        for name, entry in about["sites"].items()
    )
    for patch in patches:
        old = projection_of(model, anatomy, anatomy.sites[patch.site]).weight
        here, there = (str(found.dtype).removeprefix("torch.") for found in (old, patch.weight))
        if here != there:
            raise RunDirectoryError(
                f"{path} holds weights in {there}, but the model is in {here}: set model.dtype to "
                f"{there}, or search again"
            )
    return patches


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
