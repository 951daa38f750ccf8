"""Refitted weights on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_models import keeping, tiny_model

from depthsearch.errors import RunDirectoryError
from depthsearch.model.anatomy import describe
from depthsearch.model.patches import load_patches, save_patches
from depthsearch.model.repair import projection_of

MASK = keeping("11 00 11 11")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_patches_come_back_as_they_were(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    anatomy = describe(model)
    projections = [projection_of(model, anatomy, anatomy.sites[site]) for site in (1, 4, 5)]
    patches = [projection.divided(1.5) for projection in projections[:2]]
    gram = torch.eye(projections[2].shape[0], dtype=torch.float64)
    patches.append(projections[2].patch(projections[2].stacked * 2, gram, 0.1, 0.5))
    digest = save_patches(tmp_path / "r.safetensors", patches, anatomy, MASK)
    again = load_patches(tmp_path / "r.safetensors", model, anatomy, MASK, digest)
    for old, new in zip(patches, again, strict=True):
        assert (new.site, new.ridge, new.left) == (old.site, old.ridge, old.left)
        assert new.weight.dtype == torch.bfloat16
        assert torch.equal(new.weight, old.weight)
        assert (new.bias is None) == (old.bias is None) == (family != "gpt2")
        assert (new.norm is None) == (old.norm is None) == (family != "gemma2")
        assert old.norm is None or torch.equal(old.norm, new.norm)
        assert old.bias is None or torch.equal(old.bias, new.bias)
    with pytest.raises(RunDirectoryError, match="another mask"):
        load_patches(tmp_path / "r.safetensors", model, anatomy, keeping("11 11 00 11"), digest)
    with pytest.raises(RunDirectoryError, match="sha256"):
        load_patches(tmp_path / "r.safetensors", model, anatomy, MASK, digest[::-1])
    with pytest.raises(RunDirectoryError, match="in bfloat16, but the model is in float32"):
        load_patches(tmp_path / "r.safetensors", tiny_model(family), anatomy, MASK, digest)
