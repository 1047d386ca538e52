"""Every command at every bad place: one line, the documented exit code, no traceback, and nothing changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

import actcache
from actcache.cli import COMMANDS
from actcache.io.progress import Meter
from tests.cli.running import cachectl
from tests.store.test_disk import mount, remount
from tests.support import check, key, make_store, recipe
from tests.support.backends import each

FINGERPRINT = recipe().fingerprint

#: What each command is given besides the store; ``{new}`` is a place where nothing is.
ARGUMENTS = {
    "bench": ["--mode", "warm", "--shape", "short", "--size", "1MiB", "--rounds", "1", "--backend", "hdf5"],
    "fill": ["{corpus}", "--model", "{new}", "--layer", "1"],
    "migrate": ["{new}"],
    "export": ["{new}.npz"],
    "import": ["{corpus}"],
    "prune": ["--where", "layer=1", "--idle", "0", "--yes"],
    "pin": [FINGERPRINT],
    "unpin": [FINGERPRINT],
}
NAMES = [command.__name__ for command in COMMANDS]
READING = {"ls", "inspect", "du", "verify", "migrate", "export", "doctor"}
#: Those that may find that nothing is to be done, and then write nothing.
NOTHING_TO_DO = {"repair", "compact", "unpin"}
#: Those that make a store where none is, or need none: fill's model is looked for first, diff compares two corpora.
OTHERS = {"fill", "import", "plan", "bench", "doctor", "diff"}
each_command = pytest.mark.parametrize("name", NAMES)
each_store_command = pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHERS])


def run(name, store, tmp_path):
    (tmp_path / "corpus").write_text("a text\n")
    given = [text.format(new=tmp_path / "new", corpus=tmp_path / "corpus") for text in ARGUMENTS.get(name, [])]
    result = cachectl(name, store, *given)
    assert "Traceback" not in result.err
    return result


def tree(root):
    """The files of a store but LMDB's table of readers."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "lock.mdb"}


def test_every_command_is_tried():
    assert set(ARGUMENTS) <= set(NAMES)


@each_store_command
def test_a_missing_path(name, tmp_path):
    for url in (tmp_path / "none", f"zarr:{tmp_path}/none", f"lmdb:{tmp_path}/none"):
        assert "no store" in run(name, url, tmp_path).refused(3)
        assert not (tmp_path / "none").exists()
        assert not (tmp_path / "new").exists()


@each_store_command
def test_what_is_no_store(name, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "other").write_text("x")
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / "actcache.json").write_text("{")
    for place, said in (("file", "a folder"), ("folder", "no store"), ("marked", "actcache.json")):
        assert said in run(name, tmp_path / place, tmp_path).refused(3)
    assert "no backend" in run(name, f"nothing:{tmp_path}", tmp_path).refused(2)
    assert (tmp_path / "folder" / "other").read_text() == "x"


@each_store_command
def test_a_folder_that_cannot_be_looked_into(name, tmp_path):
    (tmp_path / "file").write_text("x")
    run(name, tmp_path / "file" / "store", tmp_path).refused(3)
    if os.geteuid() == 0:
        return  # root may read everything
    make_store(tmp_path / "store", range(3))
    os.chmod(tmp_path / "store", 0)
    try:
        run(name, tmp_path / "store", tmp_path).refused(3)
    finally:
        os.chmod(tmp_path / "store", stat.S_IRWXU)


@each_store_command
def test_a_store_of_a_newer_release(name, tmp_path):
    make_store(tmp_path / "store", range(3))
    marker = tmp_path / "store" / "actcache.json"
    marker.write_text(marker.read_text().replace('"format_version": 1', '"format_version": 99'))
    before = tree(tmp_path / "store")
    assert "upgrade" in run(name, tmp_path / "store", tmp_path).refused(4)
    assert tree(tmp_path / "store") == before


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    mount("tmpfs", place, "-o", "size=4M", "tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)


@each()
def test_a_read_only_store(kind, small_disk, tmp_path):
    """Commands that only read work; the others say why they cannot."""
    make_store(kind.url(tmp_path / "store"), range(10))
    shutil.copytree(tmp_path / "store", small_disk / "store")
    remount(small_disk, "ro")
    for name in NAMES:
        if name in ("fill", "import", "plan", "diff"):
            continue
        result = run(name, small_disk / "store", tmp_path)
        if name in READING or (name in NOTHING_TO_DO and result.code == 0):
            assert result.code == 0, (name, result.err)
        else:
            line = result.refused(3)
            assert "ead-only" in line, (name, line)
    with actcache.open(tmp_path / "new", "r") as store, store.space(recipe()) as space:
        check(space, dict.fromkeys(range(10), 0), range(12))


def fill_up(place):
    """Leave no byte free; return the file to remove."""
    with open(place / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return place / "ballast"


WIDE = recipe(hidden_size=256)


def put_wide(space, numbers):
    space.put([key(n) for n in numbers], [np.full((40, 256), n, np.float32) for n in numbers])


def check_wide(url, numbers):
    with actcache.open(url, "r") as store, store.space(WIDE) as space:
        assert space.verify().intact
        for number, entry in zip(numbers, space.get([key(n) for n in numbers]), strict=True):
            np.testing.assert_array_equal(entry.activations, np.full((40, 256), number, np.float32))
        assert len(space) == len(numbers)


@each()
def test_migrating_to_a_full_disk(kind, small_disk, tmp_path):
    """It says so and loses nothing; when there is room again, the same command ends."""
    with actcache.open(tmp_path / "source") as store, store.space(WIDE) as space:
        put_wide(space, range(40))  # 1.6 MB
    (small_disk / "ballast").write_bytes(bytes(3_000_000))
    command = ["migrate", tmp_path / "source", kind.url(small_disk / "target"), "--segment-bytes", "200kB"]
    assert "free some space" in cachectl(*command).refused(3)
    (small_disk / "ballast").unlink()
    assert cachectl(*command).code == 0
    check_wide(kind.url(small_disk / "target"), range(40))
    check_wide(tmp_path / "source", range(40))


@each()
@pytest.mark.parametrize(
    "command",
    [["compact", "--grace", 0], ["prune", "--keep-collection", "half", "--idle", 0, "--yes"], ["pin", "{name}"]],
)
def test_a_store_on_a_full_disk(kind, command, small_disk):
    """It works, or says that the disk is full; then it works when there is room again."""
    url = kind.url(small_disk / "store")
    with actcache.open(url) as store, store.space(WIDE) as space:
        for first in range(0, 30, 6):
            put_wide(space, range(first, first + 6))
            space.flush()
        store.put_collection("half", [key(n) for n in range(15)])
    name, *options = command
    full = [name, url, *(WIDE.fingerprint if option == "{name}" else option for option in options)]
    ballast = fill_up(small_disk)
    result = cachectl(*full)
    if result.code:
        assert "free some space" in result.refused(3)
        check_wide(url, range(30))
    ballast.unlink()
    assert cachectl(*full).code == 0
    check_wide(url, range(15 if name == "prune" else 30))


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["verify", "repair", "migrate", "prune"])
def test_an_interrupt_in_the_middle(name, tmp_path, monkeypatch):
    """As soon as there is progress to tell: exit code 130, one line, and the same command ends the next time."""
    store = tmp_path / "store"
    make_store(store, range(20), segments=3)
    make_store(store, range(20), layer=2)
    tell = Meter.__call__

    def interrupted(self, *told):
        tell(self, *told)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Meter, "__call__", interrupted)
        result = run(name, store, tmp_path)
        assert "run it again" in result.refused(130)
    result = run(name, store, tmp_path)
    assert result.code == 0, result.err
    left = {1, 2} if name != "prune" else {2}
    with actcache.open(tmp_path / "new" if name == "migrate" else store, "r") as opened:
        assert {one.layer for one in opened.recipes()} == left
        for one in opened.recipes():
            with opened.space(one) as space:
                check(space, dict.fromkeys(range(20), 0), range(25))


def test_a_real_interrupt_of_a_migration(tmp_path):
    """At any moment, and what was copied is not copied again."""
    with actcache.open(tmp_path / "source") as store, store.space(WIDE) as space:
        put_wide(space, range(100))
    command = [sys.executable, "-c", "from actcache.cli import main; main()", "migrate"]
    target = f"zarr:{tmp_path}/target"
    options = [str(tmp_path / "source"), target, "--segment-bytes", "100kB"]  # some forty segments
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "target").glob("spaces/*/segments/*"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "run it again" in said
    with actcache.open(target, "r") as store, store.space(WIDE) as space:
        there = len(space)
    assert there > 0
    done = cachectl("migrate", *options, "--json").json()
    assert done["spaces"][0]["copied"] == 100 - there
    check_wide(target, range(100))
