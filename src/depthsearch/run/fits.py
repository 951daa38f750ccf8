"""The text of another kind that repairs are fitted on, beside the calibration text."""

from __future__ import annotations

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


def fit_name(documents: Documents, other: Other | None) -> str:
    """What repairs are fitted on, in words."""
    if other is None:
        return text_name(documents)
    if other.share == 1:
        return text_name(other.documents)
    percent = f"{100 * other.share:g} %"
    return f"{text_name(documents)}, {percent} of them of {text_name(other.documents)}"


def text_name(documents: Documents) -> str:
    """A text's hub id, or the name of its file without the folders above."""
    source = documents.source
    return Path(source).name if is_path(source) else source
