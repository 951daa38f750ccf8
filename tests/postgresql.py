"""A PostgreSQL server of the tests' own, on a Unix socket in a temporary directory."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_WAIT_S = 120


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of an empty database; skips where no server or no driver is installed.

    As root the server runs as another user, since it refuses to run as root.
    """
    psycopg = pytest.importorskip("psycopg", reason="needs the extra postgresql")
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), os.environ.get("PATH", os.defpath)]
    path = os.pathsep.join(map(str, places))
    initdb, server = (shutil.which(name, path=path) for name in ("initdb", "postgres"))
    if initdb is None or server is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    # Neither below pytest's own directory, which others can't enter, nor with a path longer than
    # that of a socket may be.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    user: dict[str, object] = {}
    if os.geteuid() == 0:
        entry = pwd.getpwnam("nobody")
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    settings = {"cwd": folder, "env": {"PATH": path, "LC_ALL": "C"}, **user}
    running = None
    try:
        subprocess.run(
            [initdb, "-D", folder / "data", "-U", "tests", "-A", "trust", "-E", "UTF8"],
            check=True,
            capture_output=True,
            **settings,  # type: ignore[call-overload]
        )
        with (folder / "log").open("wb") as log:
            running = subprocess.Popen(
                [server, "-D", folder / "data", "-k", folder, "-h", "", "-F"],
                stdout=log,
                stderr=log,
                **settings,  # type: ignore[call-overload]
            )
        _wait(psycopg, folder, running)
        yield f"postgresql+psycopg://tests@/postgres?host={folder}"
    finally:
        if running is not None:
            running.send_signal(signal.SIGQUIT)
            running.wait(_WAIT_S)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(psycopg: object, folder: Path, running: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while running.poll() is None and time.monotonic() < deadline:
        try:
            psycopg.connect(  # type: ignore[attr-defined]
                host=str(folder), user="tests", dbname="postgres"
            ).close()
        except psycopg.OperationalError:  # type: ignore[attr-defined]
            time.sleep(0.1)
        else:
            return
    raise AssertionError((folder / "log").read_text())
