"""Read documents from a file, a folder or a hub data set."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depthsearch.errors import DataError, StorageError
from depthsearch.sources import is_disk_full, is_path, one_line, quiet

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
_ALLOWED = "txt, jsonl, json, csv, parquet"
_WITH_COLUMNS = "jsonl, json, csv or parquet"
_SHOWN = 60
_READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    ArithmeticError,
    RuntimeError,
    StopIteration,
)


@dataclass(frozen=True)
class Documents:
    """Texts in the order read, and the sha256 that names them in a signature.

    `parts` is what they were made of, such as sources and targets: a text that shares no document
    with these holds none of it either.
    """

    texts: tuple[str, ...]
    source: str
    fingerprint: str
    parts: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    @classmethod
    def of(cls, texts: Iterable[str], source: str, parts: Iterable[str] = ()) -> Documents:
        """Bundle `texts`; the fingerprint covers each text and its length, not `source`."""
        texts = tuple(texts)
        digest = hashlib.sha256()
        for text in texts:
            encoded = text.encode("utf-8", errors="surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return cls(texts, source, digest.hexdigest(), frozenset(parts))

    def unlike(self, *known: Documents) -> list[str]:
        """The different texts that none of `known` holds, be it as a part of a document."""
        held = {text.strip() for d in known for text in (*d.texts, *d.parts)}
        return [text for text in distinct(self.texts) if text.strip() not in held]

    def without(self, *known: Documents) -> Documents:
        """Those that none of `known` holds; raises DataError where nothing is left."""
        fresh = set(self.unlike(*known))
        if not fresh:
            sources = " or ".join(documents.source for documents in known)
            raise DataError(
                f"{self.source}: every document is also in {sources}; give a text of another kind"
            )
        return Documents.of((t for t in self.texts if t in fresh), self.source, self.parts)


def distinct(texts: Iterable[str]) -> list[str]:
    """The first of each text; white space around it makes no other."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(text.strip(), text)
    return list(found.values())


def load_documents(
    text: str, column: str | None = None, split: str = "train", subset: str | None = None
) -> Documents:
    """Read the documents of a local file or folder, or of a hub data set.

    `text` is a txt, jsonl, json, csv or parquet file, a folder that holds files of one of these
    types (taken in order of name), or a hub id. In txt files blank lines separate documents; a
    json file holds a list of objects, an object of objects, or an object with one such list.
    `column` names the field with the text; None takes `text`, else the only field of strings.
    `split` and `subset` matter to hub data sets only; `split` may be a slice such as
    `train[:1000]`, which keeps a large data set from being read whole. Blank texts are left out.

    Raises DataError where nothing usable is found, StorageError when the disk is full.
    """
    (texts,), source = load_columns(text, (column,), split, subset)
    kept = [value for value in texts if isinstance(value, str) and value.strip()]
    if not kept:
        raise DataError(f"{text}: holds no text; give a file or column with at least one document")
    return Documents.of(kept, source)


def load_columns(
    text: str, columns: Sequence[str | None], split: str = "train", subset: str | None = None
) -> tuple[tuple[Sequence[object], ...], str]:
    """The columns named, row by row, of what `load_documents` reads, and the name of the source.

    Raises what `load_documents` raises, but for a lack of text.
    """
    source = text if subset is None else f"{text}[{subset}]"
    if is_path(text, SUFFIXES):
        try:
            files = _files(text)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{text}: can't be read ({one_line(error, 160)}); give a text that you may read"
            ) from error
        if files[0].suffix.lower() == ".txt":
            if len(columns) > 1:
                raise DataError(
                    f"{text}: txt files have no columns, so no text with what should be written "
                    f"for it; give a {_WITH_COLUMNS} file"
                )
            named = [column for column in columns if column not in (None, "text")]
            if named:
                raise DataError(
                    f"{text}: column {named[0]!r} asked for, but txt files have none; leave "
                    "column out"
                )
            parts = [part for file in files for part in _paragraphs(file)]
            return tuple(parts for _ in columns), source
        with _reading(text):
            dataset = _local(files)
    else:
        source = f"{source}:{split}"
        with _reading(text, hub=True):
            dataset = _hub(text, subset, split)
    names = [_column_name(dataset, column, text) for column in columns]
    if len(set(names)) < len(names):
        raise DataError(
            f"{text}: column {names[0]!r} would be both the text and what should be written for "
            "it; name two columns"
        )
    return tuple(list(dataset[name]) for name in names), source


def _files(text: str) -> list[Path]:
    path = Path(text).expanduser()
    if not text or not path.exists():
        raise DataError(
            f"{text!r}: no such file or folder; give an existing {_ALLOWED} file, a folder of "
            "them, or a hub data set id such as owner/name"
        )
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{text}: unknown file type {path.suffix!r}; allowed: {_ALLOWED}")
        return [path]
    files = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    found = sorted({file.suffix.lower() for file in files})
    if len(found) != 1:
        holds = f"files of several types ({', '.join(found)})" if found else f"no {_ALLOWED} file"
        raise DataError(f"{text}: the folder holds {holds}; give one file, or files of one type")
    return files


def _paragraphs(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({one_line(error)}); convert it first") from error
    except OSError as error:
        raise DataError(f"{file}: can't be read ({one_line(error)})") from error
    return [part.strip() for part in re.split(r"\n\s*\n", content)]


def _local(files: list[Path]) -> Any:
    """The rows of jsonl, json, csv or parquet files as an in-memory `datasets.Dataset`."""
    from datasets import Dataset

    kind = files[0].suffix.lower()
    if all(file.stat().st_size == 0 for file in files):
        raise DataError(f"{files[0]}: the file is empty; give one with at least one document")
    if kind == ".json":
        rows = _json_rows(files)
        if rows is not None:
            return Dataset.from_list(rows)
    if kind in (".json", ".jsonl"):
        for file in files:
            _check_lines(file)
    readers = {".csv": Dataset.from_csv, ".parquet": Dataset.from_parquet}
    names = [str(file) for file in files if file.stat().st_size > 0]
    with tempfile.TemporaryDirectory(prefix="depthsearch-") as scratch:
        return readers.get(kind, Dataset.from_json)(names, cache_dir=scratch, keep_in_memory=True)


def _check_lines(file: Path) -> None:
    """Raise DataError where the first line is a plain value, which may crash the reader."""
    with file.open(encoding="utf-8-sig") as lines:
        first = next((line.strip() for line in lines if line.strip()), "{")
    if not first.startswith(("{", "[")):
        shown = first if len(first) <= _SHOWN else f"{first[:_SHOWN]}..."
        raise DataError(f'{file}: wanted an object a line, such as {{"text": ...}}: got {shown}')


def _json_rows(files: list[Path]) -> list[dict[str, object]] | None:
    """One dict a document, or None when the files turn out to hold one JSON value a line."""
    rows: list[dict[str, object]] = []
    for file in files:
        try:
            value = json.loads(file.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                return None
            raise
        if isinstance(value, dict):
            lists = [item for item in value.values() if isinstance(item, list)]
            if value and all(isinstance(item, dict) for item in value.values()):
                value = list(value.values())
            elif len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]):
                value = lists[0]
            else:
                value = [value]
        if not isinstance(value, list):
            raise DataError(f"{file}: holds one {type(value).__name__}; wanted a list of objects")
        records: list[Any] = [{"text": item} if isinstance(item, str) else item for item in value]
        if not all(isinstance(record, dict) for record in records):
            raise DataError(f"{file}: wanted a list of objects or of strings; it mixes other types")
        rows += records
    if not rows:
        raise DataError(f"{files[0]}: holds no record; give a file with at least one document")
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _hub(name: str, subset: str | None, split: str) -> Any:
    from datasets import load_dataset

    return load_dataset(name, subset, split=split)


def _column_name(dataset: Any, column: str | None, source: str) -> str:
    features = dataset.features
    strings = [
        name
        for name, feature in features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string", "string_view")
    ]
    listed = ", ".join(list(features)[:20]) or "none"
    if column is None:
        if "text" in strings:
            column = "text"
        elif len(strings) == 1:
            column = strings[0]
        else:
            raise DataError(
                f"{source}: no column of text is named and {len(strings)} could be meant; set "
                f"column to one of: {', '.join(strings[:20]) or listed}"
            )
    if column not in features:
        raise DataError(f"{source}: no column {column!r}; it has: {listed}")
    if column not in strings:
        raise DataError(
            f"{source}: column {column!r} holds {getattr(features[column], 'dtype', 'lists')}, "
            f"not text; columns of text: {', '.join(strings) or 'none'}"
        )
    return column


@contextmanager
def _reading(source: str, hub: bool = False) -> Iterator[None]:
    """Run a read of the `datasets` library silently and turn what it raises into one line."""
    from datasets.exceptions import DatasetsError
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    disabled = are_progress_bars_disabled()
    with quiet():
        disable_progress_bars()
        try:
            yield
        except (*_READ_ERRORS, DatasetsError) as error:
            if is_disk_full(error):
                raise StorageError(
                    f"{source}: the disk is full; free some space or point TMPDIR or HF_HOME to "
                    "another disk"
                ) from error
            if not hub:
                raise DataError(
                    f"{source}: can't be read ({one_line(error)}); check that the file is whole "
                    f"and of the type its name says"
                ) from error
            hint = "check the id, the subset and the split"
            if isinstance(error, ConnectionError):
                hint = (
                    "the hub can't be reached: give a local file instead, or unset HF_HUB_OFFLINE "
                    "if the network is there"
                )
            raise DataError(f"data set {source}: {one_line(error)}; {hint}") from error
        finally:
            if not disabled:
                enable_progress_bars()
