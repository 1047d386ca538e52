"""A store moves to an object store and back, and arrives though it is killed on the way."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest

from tests.admin.test_migrate import contents, killed, make_source, run
from tests.support import ROOT
from tests.support.backends import KINDS


def test_there_and_back(bucket, tmp_path):
    make_source(tmp_path / "source")
    held = contents(tmp_path / "source")
    there = run(tmp_path / "source", bucket.url, target_options=bucket.options)
    assert there.equal
    assert contents(bucket.url, **bucket.options) == held
    again = run(tmp_path / "source", bucket.url, target_options=bucket.options)
    assert [space.copied for space in again.spaces] == [0, 0]
    back = run(bucket.url, f"lmdb:{tmp_path}/back", source_options=bucket.options)
    assert back.equal
    assert [space.digest for space in back.spaces] == [space.target_digest for space in there.spaces]
    assert contents(tmp_path / "back") == held


# --- kills ------------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
import actcache
from actcache.admin.migration import migrate

source, source_options, target, target_options = json.loads(sys.argv[1])
old, new = actcache.open(source, "r", **source_options), actcache.open(target, **target_options)
print("begun", flush=True)
done = migrate(old, new, segment_bytes=1 << 10)
print(json.dumps([done.equal, sum(space.copied for space in done.spaces)]), flush=True)
"""


def begin(source_options, target_options):
    """Migrate in a process of its own: a client's threads would not survive a fork."""

    def migrate(source, target, kill_after):
        asked = json.dumps([source, source_options, target, target_options])
        command = [sys.executable, "-c", CHILD, asked]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout.readline() == "begun\n"
            if kill_after is not None:
                time.sleep(kill_after)
                process.kill()
            said = process.stdout.read()
        return json.loads(said) if said else None

    return migrate


def killed_between(bucket, tmp_path, source, target, kills):
    """Kill migrations between s3 and a backend in a folder, or s3 and s3."""
    remote = f"s3://{bucket.name}"
    urls = {name: KINDS[name].url(tmp_path / "source") for name in KINDS} | {"s3": f"{remote}/source"}
    options = {name: bucket.options if name == "s3" else {} for name in (source, target)}
    make_source(urls[source], **options[source])
    held = contents(urls[source], **options[source])

    def place(number):
        return f"{remote}/target{number}" if target == "s3" else KINDS[target].url(tmp_path / f"target{number}")

    start = begin(options[source], options[target])
    killed(start, held, urls[source], place, random.Random(f"{source} {target}"), kills, options[target])


def test_a_killed_migration(bucket, tmp_path):
    killed_between(bucket, tmp_path, "hdf5", "s3", 1)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("source", "target"),
    [*(("s3", other) for other in ("hdf5", "zarr", "lmdb", "s3")), *((one, "s3") for one in ("hdf5", "zarr", "lmdb"))],
)
def test_killed_migrations_for_long(bucket, source, target, tmp_path):
    killed_between(bucket, tmp_path, source, target, 20)
