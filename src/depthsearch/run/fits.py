"""The text of another kind that repairs are fitted on, beside the calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthsearch.calibration.text import Documents, load_documents
from depthsearch.calibration.windows import Other
from depthsearch.config import CalibrationConfig
from depthsearch.sources import is_path


def load_fit(calibration: CalibrationConfig) -> Other | None:
    """`calibration.fit_text` with its share, where there is one; raises DataError."""
    if calibration.fit_text is None:
        return None
    documents = load_documents(calibration.fit_text, calibration.fit_column)
    return Other(documents, calibration.fit_share)


def fit_data(other: Other | None) -> dict[str, Any]:
    """What a signature says of it, nothing where there is none."""
    if other is None:
        return {}
    return {
        "fit": {
            "source": text_name(other.documents),
            "documents": other.documents.fingerprint,
            "share": other.share,
        }
    }


def fit_name(text: str, fit: Mapping[str, Any] | None) -> str:
    """What repairs were fitted on, in words: the calibration text and what `fit_data` says."""
    if fit is None:
        return text
    if fit["share"] == 1:
        return str(fit["source"])
    return f"{text}, {100 * fit['share']:g} % of them of {fit['source']}"


def text_name(documents: Documents) -> str:
    """A text's hub id, or the name of its file without the folders above."""
    source = documents.source
    return Path(source).name if is_path(source) else source
