"""Index files that name all segments: what is flushed is seen by all, whoever dies, writes meanwhile or lists late."""

from __future__ import annotations

import json
import random
import struct
import uuid
from collections import Counter
from contextlib import suppress

import fsspec
import numpy as np
import pytest

import actcache
from actcache.errors import FormatVersionError, StorageIOError
from actcache.segments import catalog, compaction, index_files
from actcache.segments.places import marker
from actcache.segments.places.objects import options as opt
from actcache.segments.places.objects.client import Client
from tests.support import check, key, put, recipe, rows


@pytest.fixture(params=["", "zarr:"], ids=["safetensors", "zarr"])
def url(request):
    yield from a_place(request.param)


@pytest.fixture
def plain_url():
    yield from a_place("")


def a_place(format):
    name = uuid.uuid4().hex
    yield f"{format}memory://{name}/store"
    if fsspec.filesystem("memory").exists(f"/{name}"):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


class Wrapped(Client):
    """Counts the requests to the stores that are opened while it is in place, and does to them what a test wants."""

    multipart = False

    def __init__(self, wrapped, owner):
        self.where, self._wrapped, self._owner = wrapped.where, wrapped, owner

    def _asked(self, name, *arguments, **options):
        return self._owner.ask(name, lambda: getattr(self._wrapped, name)(*arguments, **options), *arguments)

    def get(self, *arguments):
        return self._asked("get", *arguments)

    def head(self, *arguments):
        return self._asked("head", *arguments)

    def listing(self, *arguments, **options):
        return self._asked("listing", *arguments, **options)

    def put(self, *arguments, **options):
        return self._asked("put", *arguments, **options)

    def put_file(self, *arguments):
        return self._asked("put_file", *arguments)

    def copy(self, *arguments):
        return self._asked("copy", *arguments)

    def remove(self, *arguments):
        return self._asked("remove", *arguments)

    def abandon(self):
        self._wrapped.abandon()

    def close(self):
        self._wrapped.close()


class Counting:
    def __init__(self):
        self.requests = Counter()
        self.names = []

    def ask(self, name, do, *arguments):
        self.requests[name] += 1
        self.names.append((name, arguments[0]))
        return do()


class Killed(BaseException):
    """The process is gone."""


WRITES = ("put", "put_file", "remove", "copy")


class Killing:
    """Ends the process at a write, before or after the store has carried it out."""

    def __init__(self, at, *, after, text=""):
        self._left, self._after, self._text = at, after, text
        self.dead = False

    def ask(self, name, do, *arguments):
        if not self.dead and name in WRITES and self._text in arguments[0]:
            self._left -= 1
            if self._left < 0:
                self.dead = True
                if self._after:
                    do()
        if self.dead:
            raise Killed
        return do()


class Failing:
    """Refuses to write what has some text in its name."""

    def __init__(self, text):
        self.text = text

    def ask(self, name, do, *arguments):
        if name in WRITES and self.text in arguments[0]:
            raise StorageIOError("a fault of the test")
        return do()


class Lagging:
    """Lists none of the last objects that were written; where it should, still all that were ``removed``."""

    def __init__(self, lag, *, removed=False):
        self.lag, self._removed, self._written, self._seen = lag, removed, [], {}

    def ask(self, name, do, *arguments):
        done = do()
        if name in ("put", "put_file"):
            self._written.append(arguments[0])
        if name == "listing" and self.lag:
            late = set(self._written[-self.lag :])
            return type(done)({k: head for k, head in done.files.items() if k not in late}, done.folders)
        if name == "listing" and self._removed:
            seen = self._seen.setdefault(arguments[0], {})
            seen.update(done.files)
            return type(done)(dict(seen), done.folders)
        return done


@pytest.fixture
def through(monkeypatch):
    """Have the stores that are opened from now on ask through an owner."""
    connect = opt.Target.connect

    def place(owner):
        made = connect if owner is None else lambda self: Wrapped(connect(self), owner)
        monkeypatch.setattr(opt.Target, "connect", made)
        return owner

    return place


@pytest.fixture
def remote(monkeypatch):
    """Have the arrays of every index file come when they are needed, as those of a large one do."""
    monkeypatch.setattr(index_files, "_AT_ONCE", 512)


def write(url, numbers, **options):
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, numbers, **options)


def held(url, versions, numbers):
    with actcache.open(url, "r") as store, store.space(recipe()) as space:
        check(space, versions, numbers)
        assert len(space) == len(versions)


def index_names(url):
    with actcache.open(url, "r") as store:
        return sorted(n for n in store.driver.listing() if "/index/" in n)


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_opening_and_flushing_cost_the_same_however_many_segments(plain_url, through, monkeypatch):
    """And a writer that is never closed leaves nothing that its readers pay for."""
    monkeypatch.setattr(index_files, "_LEAST_BYTES", 0)
    counting = through(Counting())
    costs, files = [], []
    with actcache.open(plain_url) as store, store.space(recipe()) as space:
        space._driver.merges_tiers = False
        for number in range(60):
            counting.requests.clear()
            put(space, [number])
            space.flush()
            costs.append(sum(counting.requests.values()))
            with actcache.open(plain_url, "r") as other:
                counting.requests.clear()
                counting.names.clear()
                with other.space(recipe()) as reader:
                    check(reader, dict.fromkeys(range(0, number + 1, 7), 0), range(0, number + 1, 7))
                assert not [n for what, n in counting.names if what == "listing" and n.endswith("/segments/")]
                files.append(sum("/index/" in n for what, n in counting.names if what == "get"))
    assert max(costs[5:]) <= max(costs[1:5]) + 1
    assert max(files) <= 5


def test_index_files_that_were_taken_in_go_after_a_while(plain_url, monkeypatch):
    now = [1e9]
    monkeypatch.setattr(index_files.time, "time", lambda: now[0])
    for number in range(5):
        write(plain_url, [number])
    assert len(index_names(plain_url)) == 5  # somebody may have listed them just now
    now[0] += 1000
    write(plain_url, [5])
    assert len(index_names(plain_url)) == 2  # that one, and the one that it took in
    held(plain_url, dict.fromkeys(range(6), 0), range(8))


# --- who sees what ---------------------------------------------------------------------------------------------------


def test_two_writers_that_take_in_the_same_files(url, remote):
    """Both know the same files, and publish before they look again."""
    with actcache.open(url) as one, actcache.open(url) as other:
        first, second = one.space(recipe()), other.space(recipe())
        put(first, range(2))
        first.flush()
        publish = second._driver.catalog.place.publish

        def after_the_other(*arguments, **options):
            first.flush()
            return publish(*arguments, **options)

        second._driver.catalog.place.publish = after_the_other
        for number in range(2, 12, 2):
            second.refresh()
            put(first, [number])
            put(second, [number + 1])
            second.flush()
            for space in (first, second):
                space.refresh()
                check(space, dict.fromkeys(range(number + 2), 0), range(number + 4))
        second.compact(waste=0.0, grace=0.0)
        first.refresh()
        check(first, dict.fromkeys(range(12), 0), range(14))
    held(url, dict.fromkeys(range(12), 0), range(14))


@pytest.mark.parametrize("lag", [1, 3])
def test_listings_that_lag(plain_url, through, lag, remote):
    """Who has put something sees it; others later; and no index file loses what its writer could not see."""
    lagging = through(Lagging(lag))
    versions = {}
    with actcache.open(plain_url) as one, actcache.open(plain_url) as other:
        spaces = [one.space(recipe()), other.space(recipe())]
        for number in range(30):
            space = spaces[number % 2]
            put(space, [number])
            space.flush()
            versions[number] = 0
            own = {n: 0 for n in versions if n % 2 == number % 2}
            assert all(entry is not None for entry in space.get([key(n) for n in own]))
            if number % 7 == 3:
                put(space, [number - 1], version=1, overwrite=True)
                space.flush()
                versions[number - 1] = 1
            if number == 20:
                space.compact(waste=0.0, grace=0.0)
        lagging.lag = 0
        held(plain_url, versions, range(32))
        for space in spaces:
            space.refresh()
            check(space, versions, range(32))
            space.close()
    held(plain_url, versions, range(32))


def test_listings_that_go_on_showing_what_was_removed(plain_url, through, monkeypatch):
    """It costs a few requests more, and nobody looks into the segments for it."""
    monkeypatch.setattr(index_files, "_GRACE_SECONDS", -1.0)
    through(Lagging(0, removed=True))
    for number in range(8):
        write(plain_url, [number])
        with actcache.open(plain_url, "r") as store, store.space(recipe()) as space:
            check(space, dict.fromkeys(range(number + 1), 0), range(10))
            assert space._driver.catalog._index.whole
            assert not len(space._driver.catalog._recent)


def scenario(url, done):
    """Change a space; ``done`` is told what holds from then on, after each step, and what may hold meanwhile."""
    with actcache.open(url) as store, store.space(recipe()) as space:
        versions = {}

        def step(change, **now):
            after = {**versions, **{int(n[1:]): v for n, v in now.items()}}
            after = {n: v for n, v in after.items() if v is not None}
            done(dict(versions), after)
            change()
            versions.clear()
            versions.update(after)
            done(dict(versions), dict(versions))

        def adding(numbers, version=0):
            put(space, numbers, version=version, overwrite=True)
            space.flush()

        step(lambda: adding([0, 1]), n0=0, n1=0)
        step(lambda: adding([2]), n2=0)
        step(lambda: adding([1, 3], 1), n1=1, n3=1)
        step(lambda: space.delete([key(0)]), n0=None)
        step(lambda: adding([4]), n4=0)
        step(lambda: space.compact(waste=0.0, grace=0.0))
        step(lambda: adding([5]), n5=0)
        step(lambda: space.delete([key(5), key(1)]), n5=None, n1=None)
        step(lambda: space.compact(waste=0.0, grace=0.0))
        step(lambda: adding([0], 2), n0=2)


def killed_at(url, through, at, *, after):
    """Return whether the scenario came to its end before it was killed; compare what others find with what holds."""
    state = []
    killing = through(Killing(at, after=after))
    with suppress(Killed):
        scenario(url, lambda before, then: state.append((before, then)))
    through(None)
    before, then = state[-1] if state else ({}, {})
    if state:
        with actcache.open(url) as store, store.space(recipe()) as space:
            for again in range(3):
                one_of_both(space, before, then)
                if again == 0:
                    put(space, [6])
                    space.flush()
                    before[6] = then[6] = 0
                elif again == 1:
                    space.compact(waste=0.0, grace=0.0)
        with actcache.open(url, "r") as store, store.space(recipe()) as space:
            one_of_both(space, before, then)
    return not killing.dead


def one_of_both(space, before, then):
    """What held before and after a change is there; the rest as before or as after."""
    for n in range(7):
        (entry,) = space.get([key(n)])
        allowed = [versions[n] for versions in (before, then) if n in versions]
        if entry is None:
            assert len(allowed) < 2, n
        else:
            assert any(np.array_equal(entry.activations, rows(n, version)) for version in allowed), n


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("format", "step"),
    [
        ("", 5),
        ("zarr:", 150),
        pytest.param("", 1, marks=pytest.mark.long),
        pytest.param("zarr:", 2, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("nbytes", [512, pytest.param(4 << 20, marks=pytest.mark.long)])
def test_a_writer_that_is_killed_at_any_write(format, step, nbytes, after, through, monkeypatch):
    monkeypatch.setattr(index_files, "_AT_ONCE", nbytes)
    at = 1  # the first one makes the store
    finished = False
    while not finished:
        place = a_place(format)
        finished = killed_at(next(place), through, at, after=after)
        next(place, None)
        at += step
    assert at > 20


def leave_unnamed(url, through, numbers, **options):
    """Be killed between a segment and its index file."""
    through(Killing(0, after=False, text="/index/"))
    with pytest.raises(Killed):
        write(url, numbers, **options)
    through(None)


def test_what_a_killed_writer_did_not_tell_of_is_not_served_and_goes(plain_url, through, monkeypatch):
    write(plain_url, [0])
    leave_unnamed(plain_url, through, [1, 2])
    fs, root = files_of(plain_url)
    segments = f"{root}/spaces/{recipe().fingerprint}/segments"
    held(plain_url, {0: 0}, range(4))
    with actcache.open(plain_url) as store, store.space(recipe()) as space:
        space.compact(waste=0.0, grace=0.0)
        check(space, {0: 0}, range(4))
        assert len(fs.ls(segments)) == 2
        monkeypatch.setattr(compaction, "_ABANDONED", 0.0)
        space.compact(waste=0.0, grace=0.0)
        assert len(fs.ls(segments)) == 1
    held(plain_url, {0: 0}, range(4))


def test_what_a_killed_writer_did_not_tell_of_does_not_come_before_what_is_put_later(plain_url, through):
    """Whoever puts the same key gives its segment a name of the same number, and the killed one's may sort last."""
    for number in range(8):
        if number:
            leave_unnamed(plain_url, through, [0], version=1, overwrite=True)
        else:
            write(plain_url, [9])
        write(plain_url, [0], version=2, overwrite=True)
        with actcache.open(plain_url) as store, store.space(recipe()) as space:
            space.compact(waste=0.0, grace=0.0)
        held(plain_url, {0: 2, 9: 0}, range(4))


def test_what_a_killed_writer_did_not_tell_of_stays_deleted(plain_url, through):
    """Should it be found one day, as no index is left."""
    write(plain_url, [0])
    leave_unnamed(plain_url, through, [1, 2])
    with actcache.open(plain_url) as store, store.space(recipe()) as space:
        assert space.delete([key(1)]) == 0  # nobody was served it
    fs, root = files_of(plain_url)
    fs.rm(f"{root}/spaces/{recipe().fingerprint}/index", recursive=True)
    held(plain_url, {0: 0, 2: 0}, range(4))


def test_what_is_found_without_an_index_is_told_to_all(plain_url):
    """A writer that skips keys which stand vouches for them."""
    write(plain_url, range(3))
    fs, root = files_of(plain_url)
    fs.rm(f"{root}/spaces/{recipe().fingerprint}/index", recursive=True)
    store = actcache.open(plain_url)
    assert put(store.space(recipe()), range(3)) == 0
    held(plain_url, dict.fromkeys(range(3), 0), range(5))
    assert len(index_names(plain_url)) == 1
    store.close()


def test_a_flush_whose_index_file_fails_has_not_happened(plain_url, through):
    with actcache.open(plain_url) as before, before.space(recipe()) as reader:
        through(Failing("/index/"))
        with actcache.open(plain_url) as store, store.space(recipe()) as space:
            put(space, range(3))
            with pytest.raises(StorageIOError):
                space.flush()
            check(space, dict.fromkeys(range(3), 0), range(4))
            through(None)
            with actcache.open(plain_url, retry_seconds=1) as again, again.space(recipe()) as other:
                put(other, [7])
                other.flush()
            space._driver.catalog.place._wrapped._session._made.wrapped._owner.text = "nothing"
            space.flush()
        reader.refresh()
        check(reader, {0: 0, 1: 0, 2: 0, 7: 0}, range(8))


# --- large index files -----------------------------------------------------------------------------------------------


def test_the_arrays_of_a_large_index_file_come_with_the_first_look_up(plain_url, through, remote):
    for number in range(4):
        write(plain_url, [number])
    counting = through(Counting())
    with actcache.open(plain_url, "r") as store, store.space(recipe()) as space:
        opening = [name for what, name in counting.names if what == "get" and "/index/" in name]
        counting.names.clear()
        check(space, dict.fromkeys(range(4), 0), range(6))
        looking = [name for what, name in counting.names if what == "get" and "/index/" in name]
        assert len(opening) == 2 * len(set(opening)) == 2 * len(set(looking))  # the header is longer than asked for
        counting.names.clear()
        check(space, dict.fromkeys(range(4), 0), range(6))
        assert not [name for _, name in counting.names if "/index/" in name]


def test_a_large_index_file_that_is_taken_in_before_it_is_read(plain_url, remote, monkeypatch):
    monkeypatch.setattr(index_files, "_GRACE_SECONDS", -1.0)
    write(plain_url, range(3))
    with actcache.open(plain_url, "r") as store, store.space(recipe()) as reader:
        with actcache.open(plain_url) as other, other.space(recipe()) as writer:
            write(plain_url, [3])  # and has removed the file that both know
            put(writer, [4])
            writer.flush()
            check(writer, dict.fromkeys(range(5), 0), range(6))
        check(reader, dict.fromkeys(range(5), 0), range(6))
    held(plain_url, dict.fromkeys(range(5), 0), range(6))


@pytest.mark.parametrize("array", ["entry", "segment", "origin"])
def test_a_large_index_file_whose_arrays_are_damaged(plain_url, remote, array):
    """It is seen when they come; the segments tell what it cannot."""
    write(plain_url, range(3))
    fs, root = files_of(plain_url)
    (name,) = index_names(plain_url)
    data = bytearray(fs.cat_file(f"{root}/{name}"))
    (length,) = struct.unpack("<Q", data[:8])
    begin = json.loads(data[8 : 8 + length])[array]["data_offsets"][0]
    data[8 + length + begin] ^= 1
    fs.pipe_file(f"{root}/{name}", bytes(data))
    held(plain_url, dict.fromkeys(range(3), 0), range(5))
    write(plain_url, [3])
    held(plain_url, dict.fromkeys(range(4), 0), range(5))


# --- damage, and other releases --------------------------------------------------------------------------------------


def files_of(url):
    return fsspec.filesystem("memory"), url.partition("memory:/")[2]


def test_a_damaged_index_file_hides_nothing(plain_url, monkeypatch):
    """The segments are listed then, until a writer has made another one."""
    for number in range(4):
        write(plain_url, [number])
    fs, root = files_of(plain_url)
    newest = index_names(plain_url)[-1]
    data = bytearray(fs.cat_file(f"{root}/{newest}"))
    data[len(data) // 2] ^= 1
    data[300] ^= 1
    fs.pipe_file(f"{root}/{newest}", bytes(data))
    versions = dict.fromkeys(range(4), 0)
    held(plain_url, versions, range(6))
    with actcache.open(plain_url) as store, store.space(recipe()) as space:
        put(space, [4])
        space.flush()
        check(space, {**versions, 4: 0}, range(6))
        space.compact(waste=0.0, grace=0.0)
        check(space, {**versions, 4: 0}, range(6))
        assert not space._driver.catalog._index.whole  # a segment may have been put just now that it names
        monkeypatch.setattr(catalog, "_SETTLED", 0.0)
        put(space, [5])
        space.flush()
        space.compact(waste=0.0, grace=0.0)
        versions[5] = 0
    held(plain_url, {**versions, 4: 0}, range(6))
    with actcache.open(plain_url, "r") as store, store.space(recipe()) as space:
        assert space._driver.catalog._index.whole


def test_a_segment_that_another_writer_removed_under_a_reader(url):
    for number in range(4):
        write(url, [number])
    with actcache.open(url, "r") as store, store.space(recipe()) as reader:
        with actcache.open(url) as other, other.space(recipe()) as space:
            space.delete([key(2)])
            space.compact(waste=0.0, grace=0.0)
        check(reader, {0: 0, 1: 0, 3: 0}, range(5))


def test_stores_of_before_are_read_and_written_as_they_were(plain_url, monkeypatch):
    monkeypatch.setattr(marker, "JOURNALED", 1)
    write(plain_url, range(3))
    monkeypatch.undo()
    fs, root = files_of(plain_url)
    assert json.loads(fs.cat_file(f"{root}/actcache.json"))["format_version"] == 1
    fs.rm(f"{root}/spaces/{recipe().fingerprint}/index", recursive=True)
    held(plain_url, dict.fromkeys(range(3), 0), range(5))  # its segments tell all
    write(plain_url, [3])
    fs.rm(f"{root}/spaces/{recipe().fingerprint}/index", recursive=True)
    held(plain_url, dict.fromkeys(range(4), 0), range(5))


def test_releases_of_before_refuse_a_store_of_this_one(plain_url, monkeypatch):
    write(plain_url, range(3))
    monkeypatch.setattr(marker, "FORMAT_VERSION", 2)
    for mode in ("r", "a"):
        with pytest.raises(FormatVersionError, match="format version 3 and this release reads up to 2: upgrade"):
            actcache.open(plain_url, mode)


def test_a_store_that_is_copied_to_a_folder_and_back(plain_url, tmp_path):
    """What is written there is named by an index file, too."""
    write(plain_url, range(3))
    fs, root = files_of(plain_url)
    fs.get(root, f"{tmp_path}/copy", recursive=True)
    write(f"{tmp_path}/copy", [3])
    held(f"{tmp_path}/copy", dict.fromkeys(range(4), 0), range(6))
    fs.put(f"{tmp_path}/copy/", f"{root}/", recursive=True)
    held(plain_url, dict.fromkeys(range(4), 0), range(6))


# --- all of it -------------------------------------------------------------------------------------------------------


class Writers:
    """Three writers of one store, opened anew now and then, and what it should hold."""

    def __init__(self, url, seed):
        self.url, self.rng, self.held, self.step = url, random.Random(seed), {}, 0
        self.stores = [actcache.open(url) for _ in range(3)]
        self.spaces = [store.space(recipe()) for store in self.stores]

    def put(self, space):
        fresh = [n for n in self.some(4) if n not in self.held]
        if fresh:
            put(space, fresh, version=self.step)
            space.flush()
            self.held |= dict.fromkeys(fresh, self.step)

    def overwrite(self, space):
        numbers = self.some(4)
        put(space, numbers, version=self.step, overwrite=True)
        space.flush()
        self.held |= dict.fromkeys(numbers, self.step)

    def delete(self, space):
        numbers = self.some(2)
        assert space.delete([key(n) for n in numbers]) == sum(n in self.held for n in numbers)
        self.held = {n: version for n, version in self.held.items() if n not in numbers}

    def compact(self, space):
        space.compact(waste=0.0, grace=0.0)

    def reopen(self, space):
        number = self.spaces.index(space)
        self.stores[number].close()
        self.stores[number] = actcache.open(self.url)
        self.spaces[number] = self.stores[number].space(recipe())

    def compare(self, space):
        check(space, self.held, range(14))
        with actcache.open(self.url, "r") as store, store.space(recipe()) as reader:
            check(reader, self.held, range(14))
            assert sorted(reader.keys()) == sorted(key(n) for n in self.held)

    def some(self, most):
        return self.rng.sample(range(12), self.rng.randint(1, most))

    def run(self, steps):
        changes = [self.put, self.overwrite, self.delete, self.compact, self.reopen, self.compare]
        for self.step in range(steps):
            space = self.rng.choice(self.spaces)
            space.refresh()
            self.rng.choice(changes)(space)
        for store in self.stores:
            store.close()
        held(self.url, self.held, range(14))


@pytest.mark.parametrize(
    ("format", "seeds"),
    [
        ("", range(2)),
        pytest.param("", range(2, 100), marks=pytest.mark.long),
        pytest.param("zarr:", range(20), marks=pytest.mark.long),
    ],
)
def test_random_changes_by_three_writers(format, seeds, remote, monkeypatch):
    for seed in seeds:
        monkeypatch.setattr(index_files, "_GRACE_SECONDS", [-1.0, 300.0][seed % 2])
        monkeypatch.setattr(index_files, "_LEAST_BYTES", [0, 64 << 10][seed // 2 % 2])
        place = a_place(format)
        Writers(next(place), seed).run(50)
        next(place, None)
