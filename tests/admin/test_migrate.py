"""Migration: whatever the backends, and however often it is killed, the target ends with what the source holds."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

import actcache
from actcache.admin.migration import migrate
from actcache.errors import CodecOverflowError, StoreNotFoundError, UsageError
from tests.cli.running import cachectl
from tests.support import ROOT, check, ids, key, make_store, put, recipe, rows
from tests.support.backends import KINDS, each

KEYS = [key(n) for n in range(130)]
NAMES = ("spans", "word_ids", "type_ids")
SECOND = recipe(layer=2, dtype="float16", provenance={"who": "somebody"})


def make_source(url, **options):
    """A store with everything that can be in one: two spaces, a blob, collections; copies and deletions; entries with
    and without token ids and optional arrays."""
    with actcache.open(url, **options) as store:
        with store.space(recipe()) as space:
            put(space, range(100))
            space.flush()
            put(space, range(5), version=1, overwrite=True)
            space.delete([key(n) for n in range(10, 20)])
            space.put(KEYS[100:110], [rows(n) for n in range(100, 110)])
            arrays = [rows(n) for n in range(110, 120)]
            spans = [np.arange(2 * len(a)).reshape(-1, 2) for a in arrays]
            words = [np.arange(len(a)) - 1 for a in arrays]
            some = {"spans": spans[:5], "word_ids": words[:5], "type_ids": [w % 2 for w in words[:5]]}
            space.put(KEYS[110:115], arrays[:5], [ids(n) for n in range(110, 115)], **some)
            space.put(KEYS[115:120], arrays[5:], [ids(n) for n in range(115, 120)], spans=spans[5:])
            space.put_blob("canaries.npz", b"not for us to read")
        with store.space(SECOND) as space:
            put(space, range(30))
        store.put_collection("corpus", KEYS[:50], [str(n) for n in range(50)])


def contents(url, **options):
    """What a store holds, by plain ``get``: recipes, entries and blobs by layer, and collections."""
    found = {}
    with actcache.open(url, "r", **options) as store:
        for one in store.recipes():
            with store.space(one) as space:
                entries = {}
                for name, entry in zip(KEYS, space.get(KEYS), strict=True):
                    if entry is not None:
                        arrays = {"rows": entry.activations, "ids": entry.token_ids, **entry.extras}
                        entries[name] = {n: None if a is None else (a.dtype.str, a.tolist()) for n, a in arrays.items()}
                found[one.layer] = (one.fingerprint, one.to_json(), len(space), entries, space.blob("canaries.npz"))
        collections = {name: store.collection(name) for name in store.collections()}
        found["collections"] = {name: (c.keys.tolist(), c.ids) for name, c in collections.items()}
    return found


def run(source, target, source_options=None, target_options=None, **options):
    with (
        actcache.open(source, "r", **source_options or {}) as old,
        actcache.open(target, **target_options or {}) as new,
    ):
        return migrate(old, new, **options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A source of each backend, and what it holds."""
    made = {}
    for kind in KINDS.values():
        if kind.installed:
            url = kind.url(tmp_path_factory.mktemp("sources") / kind.name)
            make_source(url)
            made[kind.name] = (url, contents(url))
    return made


def test_all_backends_hold_the_same(sources):
    (first, *others) = [held for _, held in sources.values()]
    assert len(first[1][3]) == 110
    assert all(other == first for other in others)


def test_a_chain_of_all_backends(sources, tmp_path):
    """From each backend to the next; every digest is the same, and the second run copies nothing."""
    names = list(sources)
    url, held = sources[names[0]]
    digests = []
    for number, name in enumerate([*names[1:], names[0]]):
        target = KINDS[name].url(tmp_path / f"{number}-{name}")
        done = run(url, target)
        assert done.equal
        assert [space.copied for space in done.spaces] == [space.entries for space in done.spaces]
        digests.append([(space.digest, space.target_digest) for space in done.spaces])
        assert contents(target) == held
        again = run(url, target)
        assert again.equal
        assert [space.copied for space in again.spaces] == [0, 0]
        assert set(again.collections.values()) == {"present"}
        url = target
    assert len({str(digest) for digest in digests}) == 1
    assert all(mine == theirs for mine, theirs in digests[0])


def test_the_source_is_not_changed(sources, tmp_path):
    for name, (url, _) in sources.items():
        root = actcache.segments.registry.local_path(url.partition(":")[2])
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "lock.mdb"}
        run(url, tmp_path / name)
        assert before == {
            path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "lock.mdb"
        }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_is_another_recipe(sources, tmp_path, dtype):
    """Rows are what a fill with that dtype would have stored; the digest is computed anew from the source's rows."""
    url, held = sources["hdf5"]
    done = run(url, tmp_path / "target", dtype=dtype)
    assert done.equal
    with actcache.open(tmp_path / "target", "r") as store, actcache.open(tmp_path / "expected") as expected:
        space, filled = store.space(recipe(dtype=dtype)), expected.space(recipe(dtype=dtype))
        numbers = [n for n in range(120) if n not in range(10, 20)]
        filled.put([key(n) for n in numbers], [rows(n, int(n < 5)) for n in numbers])
        assert len(space) == len(numbers)
        for number, mine, theirs in zip(
            numbers, space.get(list(held[1][3])), filled.get([key(n) for n in numbers]), strict=True
        ):
            np.testing.assert_array_equal(mine.activations, theirs.activations)
            stored = held[1][3][key(number)]
            assert stored["ids"] == (None if mine.token_ids is None else ("<i4", mine.token_ids.tolist()))
            assert {n: v for n, v in stored.items() if n in NAMES} == {
                n: (a.dtype.str, a.tolist()) for n, a in mine.extras.items()
            }
        assert space.blob("canaries.npz") == b"not for us to read"
        assert space.verify().intact
    again = run(url, tmp_path / "target", dtype=dtype)
    assert again.equal
    assert [one.copied for one in again.spaces] == [0, 0]


def test_a_dtype_that_cannot_hold_the_rows(tmp_path):
    with actcache.open(tmp_path / "source") as store, store.space(recipe()) as space:
        space.put([key(0)], [np.full((2, 8), 1e6, np.float32)])
    with pytest.raises(CodecOverflowError):
        run(tmp_path / "source", tmp_path / "target", dtype="float16")
    assert run(tmp_path / "source", tmp_path / "target", dtype="bfloat16").equal


@each()
def test_a_store_can_be_its_own_target_for_another_dtype(kind, tmp_path):
    url = kind.url(tmp_path / "store")
    make_store(url, range(20))
    assert run(url, url, dtype="float16").equal
    with actcache.open(url, "r") as store:
        assert sorted(r.dtype for r in store.recipes()) == ["float16", "float32"]
    # Also when it is run again: the space that stays where it is does not meet what becomes it.
    assert cachectl("migrate", tmp_path / "store", url, "--dtype", "float16").code == 0
    again = run(url, tmp_path / "store", dtype="float16")
    assert again.equal
    assert [one.copied for one in again.spaces] == [0, 0]


@each(everyday=("hdf5", "lmdb"))
@pytest.mark.parametrize("pair", [("float32", "float16"), ("float32", "float32 via float16")])
def test_two_spaces_that_would_become_one_are_refused(kind, pair, tmp_path):
    """Whichever came second would be found with other numbers, and no second run would mend that."""
    both = [recipe(dtype=name) if " " not in name else recipe(dtype="float16").stored_again("float32") for name in pair]
    url, target = kind.url(tmp_path / "source"), tmp_path / "target"
    with actcache.open(url) as store:
        for number, one in enumerate(both):
            with store.space(one) as space:
                put(space, range(10), version=number)
    said = f"{both[0].fingerprint[:12]} ({pair[0]})", f"{both[1].fingerprint[:12]} ({pair[1]})"
    line = cachectl("migrate", url, target, "--dtype", "float16").refused(2)
    assert "--space" in line
    assert all(one in line for one in said)
    assert not target.exists()
    with pytest.raises(UsageError, match="prefixes") as refusal:
        run(url, target, dtype="float16")
    assert all(one in str(refusal.value) for one in said)
    with actcache.open(target, "r") as store:
        assert store.fingerprints() == []
    for number, one in enumerate(both):
        done = cachectl("migrate", url, f"{target}{number}", "--dtype", "float16", "--space", one.fingerprint[:12])
        assert done.code == 0, done.err
        with actcache.open(f"{target}{number}", "r") as store, store.space(recipe(dtype="float16")) as space:
            check(space, dict.fromkeys(range(10), number), range(12))
    assert cachectl("migrate", url, target).code == 0  # in their own dtypes each has its own


def test_what_stands_in_the_target_stays(tmp_path):
    """Entries of its own, and other numbers under the same key: named, never replaced."""
    make_store(tmp_path / "source", range(20))
    with actcache.open(tmp_path / "target") as store, store.space(recipe()) as space:
        put(space, [3, 77], version=9)
        store.put_collection("c", [key(1)])
    with actcache.open(tmp_path / "source") as store:
        store.put_collection("c", [key(2)])
    done = run(tmp_path / "source", tmp_path / "target")
    assert not done.equal
    assert done.spaces[0].differing == [key(3)]
    assert done.spaces[0].digest != done.spaces[0].target_digest
    assert "another of that name" in done.collections["c"]
    with actcache.open(tmp_path / "target", "r") as store, store.space(recipe()) as space:
        np.testing.assert_array_equal(space.get([key(3)])[0].activations, rows(3, 9))
        np.testing.assert_array_equal(space.get([key(77)])[0].activations, rows(77, 9))
        np.testing.assert_array_equal(space.get([key(4)])[0].activations, rows(4))
        assert store.collection("c").keys.tobytes() == key(1)


def flip(url, number):
    """Change a bit of a document's rows where they lie; return the file."""
    (path,) = [p for p in (url / "spaces").rglob("*.h5") if rows(number).tobytes() in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(rows(number).tobytes())] ^= 1
    path.write_bytes(data)
    return path


def test_corrupt_entries_of_the_source_are_named_and_the_rest_is_copied(tmp_path):
    make_store(tmp_path / "source", range(20))
    flip(tmp_path / "source", 7)
    done = run(tmp_path / "source", tmp_path / "target")
    assert not done.equal
    assert done.spaces[0].corrupt == [key(7)]
    assert done.spaces[0].differing == []
    with actcache.open(tmp_path / "target", "r") as store, store.space(recipe()) as space:
        assert sorted(space.keys()) == sorted(key(n) for n in range(20) if n != 7)
        assert space.verify().intact
    result = cachectl("migrate", tmp_path / "source", tmp_path / "target")
    assert result.code == 4
    assert "1 entry corrupt in the source" in result.out
    assert "NOT EQUAL" in result.out


def test_corrupt_entries_of_the_target_are_written_again(tmp_path):
    make_store(tmp_path / "source", range(20))
    assert run(tmp_path / "source", tmp_path / "target").equal
    flip(tmp_path / "target", 7)
    done = run(tmp_path / "source", tmp_path / "target")
    assert done.equal
    assert done.spaces[0].copied == 1
    with actcache.open(tmp_path / "target", "r") as store, store.space(recipe()) as space:
        assert space.verify().intact


def test_a_damaged_space_hides_no_other(tmp_path):
    make_store(tmp_path / "source", range(5))
    folder = make_store(tmp_path / "source", range(5), layer=2)
    (folder / "recipe.json").write_text("{")
    done = run(tmp_path / "source", tmp_path / "target")
    assert not done.equal
    assert list(done.unreadable) == [recipe(layer=2).fingerprint]
    assert done.spaces[0].equal


def test_the_command(sources, tmp_path):
    url, held = sources["zarr"]
    result = cachectl("migrate", url, tmp_path / "new", "--json")
    assert result.code == 0
    done = json.loads(result.out)
    assert done["equal"]
    assert [space["digest"] for space in done["spaces"]] == [space["target_digest"] for space in done["spaces"]]
    assert contents(tmp_path / "new") == held
    text = cachectl("migrate", url, f"lmdb:{tmp_path}/other", "--space", recipe().fingerprint[:5]).out
    assert "110 entries, 110 copied" in text
    assert done["spaces"][[s["space"] for s in done["spaces"]].index(recipe().fingerprint)]["digest"] in text
    assert "no store" in cachectl("migrate", tmp_path / "none", tmp_path / "made").refused(3)
    assert not (tmp_path / "made").exists()
    assert "no codec 'int3'" in cachectl("migrate", url, tmp_path / "new", "--dtype", "int3").refused(2)
    with pytest.raises(UsageError), actcache.open(url, "r") as store:
        migrate(store, store, prefixes=["nothing"])


def test_with_object_stores(sources, tmp_path):
    url, held = sources["hdf5"]
    there = f"memory://{tmp_path.name}-{os.getpid()}/store"
    assert run(url, there).equal
    assert contents(there) == held
    assert run(there, tmp_path / "back").equal
    assert contents(tmp_path / "back") == held


# --- kills ------------------------------------------------------------------------------------------------------------

DRIVER = """
import json, os, sys
import actcache
from actcache.admin.migration import migrate

for line in sys.stdin:
    source, target, warm = json.loads(line)
    if warm:  # what this loads, no child has to
        with actcache.open(source, "r") as old, actcache.open(target) as new:
            migrate(old, new)
        print("warm", flush=True)
        continue
    child = os.fork()
    if child == 0:
        with actcache.open(source, "r") as old, actcache.open(target) as new:
            done = migrate(old, new, segment_bytes=1 << 10)
        print(json.dumps([done.equal, sum(space.copied for space in done.spaces)]), flush=True)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


class Driver:
    """A process that forks a child for each migration, so that none has to import anything."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.warm: set[str] = set()

    def ask(self, source: str, target: str, *, warm: bool = False) -> str:
        self.process.stdin.write(json.dumps([source, target, warm]) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def migrate(self, source: str, target: str, kill_after: float | None) -> list | None:
        """Run a migration; return what it said, None where it was killed before."""
        child = int(self.ask(source, target))
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it had finished before
                os.kill(child, signal.SIGKILL)
        said = self.process.stdout.readline()
        if said == "ended\n":
            return None
        assert self.process.stdout.readline() == "ended\n"
        return json.loads(said)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    command = [sys.executable, "-c", DRIVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield Driver(process)
        process.stdin.close()


def killed(begin, held, source, target, chance, kills, options=None):
    """Kill a migration at random moments, and check each time that the target has what it had, and more.

    Args:
        begin: begins one and kills it after some seconds: (URL, URL, seconds or None) -> what it said, None if killed.
        target: URL by the number of the attempt; a full one makes room for the next.
        options: of the target.
    """
    url, longest, before, ended = target(0), 0.6, 0, 0
    for number in range(1, kills + 1):
        said = begin(source, url, chance.uniform(0.01, longest))
        longest *= 1.2 if said is None else 0.6  # so that most are killed, on a machine of any speed
        ended += said is not None
        there = counted(url, options or {})
        assert there >= before  # nothing that was published is lost
        before = there
        if there == 140:  # start over, so that there is always something left
            url, before = target(number), 0
    assert kills < 10 or ended <= 0.7 * kills
    equal, copied = begin(source, url, None)
    assert equal
    assert copied == 140 - before
    assert contents(url, **options or {}) == held


def counted(url, options) -> int:
    """Return the entries of a store as a killed migration left it, all of which are right."""
    entries = 0
    try:
        store = actcache.open(url, "r", **options)
    except StoreNotFoundError:
        return 0
    with store:
        for one in store.recipes():
            with store.space(one) as space:
                found = space.verify()
                assert found.intact
                entries += found.entries
    return entries


def killed_here(sources, driver, source, target, tmp_path, kills):
    url, held = sources[source]
    for name in {source, target} - driver.warm:
        driver.ask(sources[name][0], KINDS[name].url(tmp_path / f"warm-{name}"), warm=True)
        driver.warm.add(name)
    chance = random.Random(f"{source} {target}")
    killed(driver.migrate, held, url, lambda n: KINDS[target].url(tmp_path / f"target{n}"), chance, kills)


PAIRS = pytest.mark.parametrize(("source", "target"), [(one, other) for one in KINDS for other in KINDS])


#: Each backend once at either end.
CHAIN = list(zip(KINDS, [*list(KINDS)[1:], *list(KINDS)[:1]], strict=True))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(one, other, marks=[] if (one, other) in CHAIN else pytest.mark.long)
        for one in KINDS
        for other in KINDS
    ],
)
def test_killed_migrations(sources, driver, source, target, tmp_path):
    if not {source, target} <= set(sources):
        pytest.skip("a backend is not installed")
    killed_here(sources, driver, source, target, tmp_path, 1)


@pytest.mark.long
@PAIRS
def test_killed_migrations_for_long(sources, driver, source, target, tmp_path):
    if not {source, target} <= set(sources):
        pytest.skip("a backend is not installed")
    killed_here(sources, driver, source, target, tmp_path, 20)
