from __future__ import annotations

import errno
import logging
import warnings

import pytest

from depthsearch.sources import is_disk_full, is_path, one_line, quiet


@pytest.mark.parametrize(
    "source",
    [
        "./model",
        "../model",
        "~/model",
        "/model",
        "a/b/c",
        "model/",
        "x.gguf",
        "a/X.GGUF",
        "",
        "a\\b",
    ],
)
def test_a_name_written_as_a_path_is_one(source):
    assert is_path(source, (".gguf",))


@pytest.mark.parametrize("source", ["gpt2", "owner/name", "owner/name-v1.5", "owner/x.gguf"])
def test_a_hub_id_is_no_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_path(source)


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert is_path("owner")
    assert is_path("owner/name"), "a folder that exists makes a missing file in it a path"


def test_what_cant_be_looked_at_is_a_path():
    assert is_path("n" * 300)


def test_one_line_takes_the_innermost_cause_and_shortens_it():
    try:
        try:
            raise ValueError("first\n  second " + "x" * 400)
        except ValueError as cause:
            raise RuntimeError("outer") from cause
    except RuntimeError as error:
        line = one_line(error, limit_chars=30)
    assert line.startswith("first second xxx")
    assert len(line) == 30
    assert one_line(StopIteration()) == "StopIteration"


def test_a_full_disk_is_found_behind_other_errors():
    outer = RuntimeError("generation failed")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_disk_full(outer)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


def test_quiet_silences_and_restores(caplog):
    logger = logging.getLogger("transformers")
    before = logger.level
    with quiet():
        logger.warning("unheard")
        warnings.warn("unheard", UserWarning, stacklevel=1)
        assert logger.level == logging.CRITICAL
    assert logger.level == before
    assert not caplog.records
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert logger.level == before
