"""A real PostgreSQL server of the tests' own, and stores in both databases."""

import itertools
import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest

from nervure.spec import Job, Measurement, Record, Status
from nervure.store import Store


def binaries():
    """Return the folder of the newest server's programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: float(file.parts[-3]))
    which = shutil.which("initdb")
    return found[-1].parent if found else Path(which).parent if which else None


def unprivileged():
    """Return what makes `subprocess` run as somebody else: the server refuses to run as root."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return {}
    passwd = Path("/etc/passwd").read_text()
    user = "postgres" if passwd.startswith("postgres:") or "\npostgres:" in passwd else "nobody"
    return {"user": user, "group": int(next(x for x in passwd.splitlines() if x.startswith(f"{user}:")).split(":")[3])}


@pytest.fixture(scope="session")
def server():
    """Start a server that listens on a socket in a folder of its own, and give that folder."""
    programs = binaries()
    if programs is None:
        reason = "there is no PostgreSQL server on this machine: apt-get install postgresql"
        if os.environ.get("NERVURE_NEEDS_SERVERS"):
            pytest.fail(reason)
        pytest.skip(reason)
    # A short path: that of a socket may not be longer than a hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="nervure-pg-", dir="/tmp"))
    someone = unprivileged()
    if someone:
        shutil.chown(folder, someone["user"], someone["group"])
    usual = {"cwd": folder, "stdin": subprocess.DEVNULL, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}} | someone
    data = folder / "data"
    make = [programs / "initdb", "-D", data, "-U", "nervure", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(make, check=True, capture_output=True, **usual)
    settings = ("listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_connections=60")
    log = (folder / "log").open("wb")
    words = [programs / "postgres", "-D", data, *(word for setting in settings for word in ("-c", setting))]
    running = subprocess.Popen(words, stdout=log, stderr=log, **usual)
    try:
        for _ in range(300):
            try:
                psycopg.connect(f"host={folder} user=nervure dbname=postgres").close()
                break
            except psycopg.OperationalError:
                assert running.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield folder
    finally:
        running.send_signal(2)  # the fast shutdown
        running.wait(60)
        log.close()
        shutil.rmtree(folder)


_NUMBERS = itertools.count()


@pytest.fixture
def make_database(server):
    """Return a function that makes an empty database and gives its address."""

    def make(options=""):
        name = f"team_{next(_NUMBERS)}"
        with psycopg.connect(f"host={server} user=nervure dbname=postgres", autocommit=True) as raw:
            raw.execute(f"CREATE DATABASE {name} {options}")
        return f"postgresql://nervure@/{name}?host={server}"

    return make


@pytest.fixture
def database(make_database):
    return make_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request, tmp_path):
    """Where a store may be made: a file, then a database of the server."""
    if request.param == "postgresql":
        return request.getfixturevalue("database")
    return str(tmp_path / "deep" / "store.db")


@pytest.fixture
def store(where):
    with Store.open(where) as opened:
        yield opened


def _record(seed=0, status=Status.DONE, params=None, **changes):
    full = Record(
        job=Job(target="claim:a/b", arm="*", case="lenet", seed=seed, params={"lr": 0.1, **(params or {})}),
        status=status,
        measurements=(
            Measurement(arm="ours", metric="accuracy", value=0.1 + 0.2),
            Measurement(arm="ours", metric="loss", value=math.inf),
            Measurement(arm="ours", metric="loss", value=-math.inf, step=0.5),
            Measurement(arm="überarm", metric="loss", value=5e-324, step=1e300),
        ),
        cost={"seconds": 1.25, "rss": math.inf},
        warnings=("careful \ud800 \x00", "two"),
        error=None if status is Status.DONE else "RuntimeError: no\n\x00",
        environment={"torch": "2.13"},
        started="2026-01-01T00:00:00+00:00",
    )
    return full.replace(**changes)


@pytest.fixture
def made():
    """Return what makes a record that is hard to keep."""
    return _record
