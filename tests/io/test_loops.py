"""The compiled loops against the same in NumPy, and against what a stranger's store may say."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from actcache.errors import UsageError
from actcache.format.keys import join_keys
from actcache.io import loops, numpy_loops
from actcache.io.loops import Column, Digests, Lookup, LookupTable, Pooled, Scattered
from tests.support.waiting import DEADLINE

BOTH = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "numpy"])


@pytest.fixture(autouse=True)
def _chosen(request, monkeypatch):
    assert not loops.missing  # the tests run where there is a compiler
    if "compiled" in request.fixturenames and not request.getfixturevalue("compiled"):
        monkeypatch.setattr(loops, "_library", None)


def by_numpy(call):
    """Return what a call gives without the compiled loops."""
    library, loops._library = loops._library, None
    try:
        return call()
    finally:
        loops._library = library


# --- looking up -------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    """Some tables of a space: keys from a small alphabet, some of them damaged, copies, deletions, segments that are
    gone."""
    segments = draw(st.integers(1, 4))
    limits = np.array(draw(st.lists(st.integers(0, 30), min_size=segments, max_size=segments)), np.int64)
    names = np.array(draw(st.permutations(range(segments))), np.int64)
    made = []
    for _ in range(draw(st.integers(0, 3))):
        size, own = draw(st.integers(0, 12)), draw(st.integers(1, 3))
        rng = np.random.default_rng(draw(st.integers(0, 1000)))
        prefix = np.sort(rng.choice(np.array([0, 1, 5, 2**63, 2**64 - 1], np.uint64), size))
        rest = rng.integers(0, 2, (size, 24)).astype(np.uint8) * (rng.random((size, 1)) < 0.2)
        u4 = [rng.integers(0, most, size).astype(np.uint32) for most in (own + 1, own + 1, 5)]
        made.append(
            LookupTable(
                *(prefix, rest.astype(np.uint8), *u4),
                rng.integers(-2, 30, size),
                rng.integers(0, 2**63, size).astype(np.uint64),
                None if rng.random() < 0.5 else rng.random(size) < 0.7,
                rng.integers(-1, segments + 1, own),
                rng.permutation(own),
            )
        )
    prefixes = np.array([0, 1, 5, 7, 2**63, 2**64 - 1], np.uint64)
    return made, limits, names, join_keys(prefixes, np.zeros((6, 24), np.uint8))


@given(tables())
def test_what_is_found_is_what_numpy_finds(made):
    tables, limits, names, keys = made
    lookup = Lookup(tables, limits, names)
    found, wanted = lookup.locate(keys), by_numpy(lambda: lookup.locate(keys))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spread", ["even", "equal", "crowded", "two ends"])
def test_any_prefixes_are_found(spread):
    """Prefixes of digests lie evenly; a stranger's lie anywhere, and are found in as good a time."""
    rng = np.random.default_rng(3)
    size = 200_000
    prefix = {
        "even": lambda: rng.integers(0, 2**64, size, np.uint64),
        "equal": lambda: np.repeat(np.arange(size // 10, dtype=np.uint64), 10),
        "crowded": lambda: 2 ** rng.integers(0, 64, size, np.uint64) + rng.integers(0, 9, size, np.uint64),
        "two ends": lambda: np.concatenate([np.arange(size, dtype="u8"), ~np.arange(size, dtype="u8")]),
    }[spread]()
    prefix.sort()
    if spread == "crowded":
        prefix = np.unique(prefix)
    size = len(prefix)
    rest = np.zeros((size, 24), np.uint8)
    rest[:, :4] = np.arange(size, dtype="<u4").view(np.uint8).reshape(-1, 4)  # so each whole key is another
    zeros = np.zeros(size, np.uint32)
    table = LookupTable(
        *(prefix, rest, zeros, zeros, zeros + 1, np.arange(size), np.arange(size, dtype=np.uint64)),
        *(None, np.zeros(1, np.int64), np.zeros(1, np.int64)),
    )
    which = rng.permutation(size)[:5000]
    found = Lookup([table], np.array([size]), np.zeros(1, np.int64)).locate(join_keys(prefix[which], rest[which]))
    np.testing.assert_array_equal(found.row, which)


# --- rows -------------------------------------------------------------------------------------------------------------


def chain(seed, *parts):
    for part in parts:
        seed = xxhash.xxh3_64_intdigest(np.ascontiguousarray(part).tobytes(), seed)
    return seed


@st.composite
def batches(draw):
    """Entries of one memory that is a file, too, and what there is to say of them."""
    lengths = np.array(draw(st.lists(st.integers(0, 9), min_size=0, max_size=12)), np.int64)
    width = draw(st.sampled_from([None, 9, 11]))
    row_bytes = draw(st.sampled_from([1, 8, 24, 1536]))
    starts = np.array([draw(st.integers(0, 40)) for _ in lengths], np.int64) * row_bytes + draw(st.integers(0, 7))
    offsets = np.arange(len(lengths) + 1) * width if width else np.concatenate([[0], np.cumsum(lengths)])
    return lengths, offsets.astype(np.int64), row_bytes, starts


@given(batches(), st.sampled_from(["memory", "files", "direct", "both"]), st.integers(1, 5), st.booleans())
def test_what_is_gathered_is_what_numpy_gathers(tmp_path_factory, batch, way, threads, damage):
    lengths, offsets, row_bytes, begins = batch
    count, rng = len(lengths), np.random.default_rng(5)
    stored = rng.integers(0, 256, 60 * row_bytes + 8).astype(np.uint8)
    small = rng.integers(0, 256, (60, 4)).astype(np.uint8)
    path = tmp_path_factory.getbasetemp() / f"rows-{row_bytes}"
    path.write_bytes(stored.tobytes())
    flags = os.O_RDONLY | (os.O_DIRECT if way == "direct" else 0)
    try:
        file = os.open(path, flags)
    except OSError:  # no direct reads here
        file, way = os.open(path, os.O_RDONLY), "files"
    files = None if way == "memory" else np.full(count, file, np.int32)
    seeds = rng.integers(0, 2**63, count).astype(np.uint64)
    parts = [
        [small[i : i + n].reshape(-1), stored[b : b + n * row_bytes]]
        for i, (n, b) in enumerate(zip(lengths.tolist(), begins.tolist(), strict=True))
    ]
    expected = np.array([chain(int(s), *p) for s, p in zip(seeds.tolist(), parts, strict=True)], np.uint64)
    if damage and count:
        expected[0] ^= np.uint64(1)

    def call():
        out = np.full((int(offsets[-1]), row_bytes), 7, np.uint8)
        ids = np.full((int(offsets[-1]), 4), 7, np.uint8)
        sums = np.zeros(count, np.uint64)
        columns = [
            Column(4, ids, small, np.arange(count, dtype=np.int64) * 4),
            Column(row_bytes, out, None if way in ("files", "direct") else stored, begins, files, begins),
        ]
        digests = Digests(2, seeds=seeds, expected=expected, sums=sums)
        bad = loops.gather(columns, lengths, offsets, digests, threads=threads, direct=way == "direct")
        return bad, out, ids, sums

    try:
        found, wanted = call(), by_numpy(call)
    finally:
        os.close(file)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    bad, out, _, sums = found
    assert bad.tolist() == [0] * bool(damage and count and lengths[0])
    for i, n in enumerate(lengths.tolist()):
        own = slice(int(offsets[i]), int(offsets[i]) + n)
        np.testing.assert_array_equal(out[own].reshape(-1), parts[i][1])
        assert not out[own.stop : int(offsets[i + 1])].any()
        assert not n or sums[i] == chain(int(seeds[i]), *parts[i])


@BOTH
def test_optional_arrays_have_a_chain_of_their_own(compiled):
    rows, spans = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6, dtype=np.int32)
    lengths, offsets = np.array([4, 2]), np.array([0, 4, 6])
    parts = [(rows[:4], spans[:4]), (rows[4:], spans[4:])]
    first = np.array([chain(9, one) for one, _ in parts], np.uint64)
    second = np.array([chain(int(seed), other) for seed, (_, other) in zip(first, parts, strict=True)], np.uint64)
    columns = [Column(8, memory=rows, begins=offsets[:2] * 8), Column(4, memory=spans, begins=offsets[:2] * 4)]
    seeds = np.full(2, 9, np.uint64)

    def bad(expected, expected_more):
        digests = Digests(1, seeds=seeds, expected=expected, expected_more=expected_more)
        return loops.gather(columns, lengths, offsets, digests).tolist()

    assert bad(first, second) == []
    assert bad(first, second + np.array([1, 0], np.uint64)) == [0]
    assert bad(first ^ np.array([0, 1], np.uint64), second) == [1]
    sums, more = np.zeros((2, 2), np.uint64)
    loops.gather(columns, lengths, offsets, Digests(1, seeds=seeds, sums=sums, more=more))
    assert (sums.tolist(), more.tolist()) == (first.tolist(), second.tolist())


@BOTH
@pytest.mark.parametrize("begin", [-1, -(2**63), 2**63 - 1, 2**62, 100, 77])
def test_entries_outside_of_their_memory_are_not_followed(compiled, begin):
    memory, out = np.arange(100, dtype=np.uint8), np.full((5, 8), 7, np.uint8)
    lengths, begins = np.array([1, 3, 1]), np.array([0, begin, 92])
    bad = loops.gather([Column(8, out, memory, begins)], lengths, np.array([0, 1, 4, 5]), threads=1)
    assert bad.tolist() == [1]
    assert out.tolist() == [list(range(8)), *[[7] * 8] * 3, list(range(92, 100))]


@BOTH
def test_entries_without_room_are_not_brought(compiled):
    memory, out = np.arange(100, dtype=np.uint8), np.full((3, 8), 7, np.uint8)
    lengths, begins = np.array([1, 3, 1]), np.array([0, 8, 92])
    places = np.array([[0, 1, 2], [1, 2, 3]])  # a place of one row for three
    bad = loops.gather([Column(8, out, memory, begins)], lengths, places, threads=1)
    assert bad.tolist() == [1]
    assert out.tolist() == [list(range(8)), [7] * 8, list(range(92, 100))]


@BOTH
@pytest.mark.parametrize("length", [2**31, 2**62, 2**63 - 1])
def test_lengths_that_overflow_are_not_followed(compiled, length):
    memory, out = np.zeros(100, np.uint8), np.full((2, 1024), 7, np.uint8)
    lengths, offsets = np.array([length]), np.array([[0], [1]])
    assert loops.gather(
        [Column(1 << 10, out, memory, np.zeros(1, np.int64))], lengths, offsets, threads=1
    ).tolist() == [0]
    assert (out == 7).all()


@BOTH
@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_ends_too_early_is_told_of(compiled, tmp_path, direct):
    (tmp_path / "rows").write_bytes(bytes(range(250)) * 40)
    file = os.open(tmp_path / "rows", os.O_RDONLY)
    out = np.full((3, 5000), 7, np.uint8)
    places = np.array([0, 6000, 20_000])
    columns = [Column(5000, out, files=np.full(3, file, np.int32), places=places)]
    bad = loops.gather(columns, np.ones(3, np.int64), np.arange(4), direct=direct, threads=2)
    os.close(file)
    assert bad.tolist() == [1, 2]
    assert out[0].tobytes() == (bytes(range(250)) * 20)


def test_a_read_that_fails_names_the_entry(tmp_path):
    (tmp_path / "rows").write_bytes(bytes(100))
    file = os.open(tmp_path / "rows", os.O_RDONLY)
    files = np.array([file, 10**6, file], np.int32)
    columns = [Column(10, np.empty((3, 10), np.uint8), files=files, places=np.zeros(3, np.int64))]
    with pytest.raises(loops.EntryReadError) as caught:
        loops.gather(columns, np.ones(3, np.int64), np.arange(4))
    os.close(file)
    assert (caught.value.entry, caught.value.strerror) == (1, os.strerror(caught.value.errno))


def test_no_entries():
    assert loops.gather([Column(8, np.empty((0, 8), np.uint8))], np.empty(0, np.int64), np.zeros(1, np.int64)).size == 0
    none = Lookup([], np.empty(0, np.int64), np.empty(0, np.int64)).locate(np.zeros((2, 32), np.uint8))
    assert none.tokens.tolist() == [0, 0]


def test_pages_that_are_absent(tmp_path):
    import mmap

    path = tmp_path / "pages"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        memory = np.frombuffer(mapped, np.uint8)
        column = Column(4096, memory=memory, begins=np.array([0, 1 << 19]))
        assert not loops.seems_absent(column, np.array([3, 5]))
        del memory, column


# --- threads, forks, signals ------------------------------------------------------------------------------------------


def a_call(seed=0, threads=4):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (400, 4096)).astype(np.uint8)
    lengths = rng.integers(0, 5, 120)
    begins = rng.integers(0, 390, 120)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    out = np.empty((int(offsets[-1]), 4096), np.uint8)
    loops.gather([Column(4096, out, rows, begins * 4096)], lengths, offsets, threads=threads)
    wanted = np.concatenate([rows[b : b + n] for b, n in zip(begins, lengths, strict=True)])
    np.testing.assert_array_equal(out, wanted)


def test_many_threads_at_once():
    failed = []

    def work(seed):
        try:
            for i in range(20):
                a_call(seed * 100 + i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert failed == []


def test_a_forks_child_has_threads_of_its_own():
    a_call()
    stop = threading.Event()

    def work():
        while not stop.is_set():
            a_call(1)

    busy = threading.Thread(target=work)
    busy.start()
    try:
        children = []
        for _ in range(8):
            child = os.fork()
            if not child:
                signal.alarm(60)
                a_call(2)
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    finally:
        stop.set()
        busy.join(DEADLINE)


@pytest.mark.processes
def test_signals_are_for_python():
    """The loops' threads take none, so that the main thread's sleep is broken off."""
    code = """
import os, signal, threading, time
from tests.io.test_loops import a_call
a_call()
threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.stderr) == ("interrupted\n", "")


@pytest.mark.processes
@pytest.mark.parametrize("how", ["asked for", "no library", "another xxhash"])
def test_without_the_library_numpy_does_it_and_doctor_says_so(how, tmp_path):
    code = {
        "asked for": "import os; os.environ['ACTCACHE_LOOPS'] = 'numpy'",
        "no library": "from pathlib import Path; Path.with_name = lambda path, name, old=Path.with_name: "
        "Path('/nowhere') if name.startswith('_loops') else old(path, name)",
        "another xxhash": "import xxhash; xxhash.xxh3_64_intdigest = lambda *given, "
        "old=xxhash.xxh3_64_intdigest: old(*given) ^ 1",
    }[how]
    code += """
from actcache.io import loops
from tests.io.test_loops import a_call
assert loops.missing and loops._library is None
a_call()
print(loops.missing)
"""
    # `make sanitize` names its own build there, which would be found.
    environment = {name: value for name, value in os.environ.items() if name != "ACTCACHE_LOOPS"}
    told = [sys.executable, "-c", code]
    ran = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stderr == ""
    assert ran.stdout.strip()


def test_the_structures_are_those_of_the_library():
    """A field that one side lacks would shift all behind it."""
    assert loops._library.act_sizes
    kinds = (loops._Table, loops._Lookup, loops._Column, loops._Batch, loops._Reading)
    kinds += (loops._Conversion, loops._Framing)
    sizes = (ctypes.c_int64 * len(kinds))()
    loops._library.act_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(kind) for kind in kinds]


@given(tables(), st.sampled_from([None, 3, 5]), st.integers(0, 25), st.integers(0, 1000), st.booleans())
def test_a_batch_by_one_call_is_what_looking_up_and_gathering_give(made, width, room, drawn, damage):
    tables, limits, names, keys = made
    rng = np.random.default_rng(drawn)
    keys = keys[rng.integers(0, len(keys), rng.integers(0, 9))]
    sizes = 2, 8  # bytes of a row
    memory = [rng.integers(0, 256, 40 * size).astype(np.uint8) for size in sizes]
    firsts = [rng.integers(0 if rng.random() < 0.8 else -1, 12, len(limits)) for _ in sizes]
    lookup = Lookup(tables, limits, names)
    reading = lookup.reading([loops.MappedColumn(*of) for of in zip(sizes, memory, firsts, strict=True)], looked=1)
    found = by_numpy(lambda: lookup.locate(keys))
    there = found.tokens > 0
    offsets = np.arange(len(keys) + 1) * width if width else np.concatenate([[0], np.cumsum(found.tokens)])
    begins = [(np.where(there, of[found.segment], 0) + found.row) * n for n, of in zip(sizes, firsts, strict=True)]
    wanted, out = ([np.full((room, size), 7, np.uint8) for size in sizes] for _ in range(2))
    seed = None if damage else 11
    if offsets[-1] <= room and (width is None or found.tokens.max(initial=0) <= width):
        columns = [Column(n, o, m, b) for n, o, m, b in zip(sizes, wanted, memory, begins, strict=True)]
        digests = None if damage else Digests(2, 11, keys, expected=found.checksums)
        bad = by_numpy(lambda: loops.gather(columns, found.tokens, offsets.astype(np.int64), digests))
        fits = not found.outside and all((of[found.segment[there]] >= 0).all() for of in firsts)
    else:
        fits = False
    read = reading.read(keys, out, width, seed)
    assert (read is not None) == fits
    if read is not None:
        np.testing.assert_array_equal(read[0], found.tokens)
        np.testing.assert_array_equal(read[1], bad)
        if not len(bad):
            for one, other in zip(out, wanted, strict=True):
                np.testing.assert_array_equal(one, other)


def test_entries_that_are_intact_and_not_by_one_call():
    """With digests that are right, which the test above never draws."""
    rng = np.random.default_rng(2)
    lengths, prefix = np.array([3, 1, 5, 2]), np.array([1, 5, 9, 20], np.uint64)
    begins, memory = np.cumsum(lengths) - lengths, rng.integers(0, 256, (20, 24)).astype(np.uint8)
    keys = join_keys(prefix, rng.integers(0, 256, (4, 24)).astype(np.uint8))
    sums = np.empty(4, np.uint64)
    column = Column(24, np.empty((11, 24), np.uint8), memory, begins * 24)
    loops.gather([column], lengths, np.r_[0, np.cumsum(lengths)], Digests(1, 3, keys, sums=sums))
    zero = np.zeros(4, np.uint32)
    table = LookupTable(
        *(prefix, np.ascontiguousarray(keys[:, 8:]), zero, zero, lengths.astype(np.uint32), begins, sums, None),
        *(np.zeros(1, np.int64), np.zeros(1, np.int64)),
    )
    lookup = Lookup([table], np.array([20]), np.zeros(1, np.int64))
    reading = lookup.reading([loops.MappedColumn(24, memory, np.zeros(1, np.int64))], looked=0)
    out, order = np.empty((4 * 6, 24), np.uint8), np.array([2, 0, 3, 1])
    tokens, bad = reading.read(keys[order], [out], 6, 3)
    assert tokens.tolist() == lengths[order].tolist()
    assert not len(bad)
    for place, i in zip(out.reshape(4, 6, 24), order, strict=True):
        np.testing.assert_array_equal(place[: lengths[i]], memory[begins[i] :][: lengths[i]])
        assert not place[lengths[i] :].any()
    memory[begins[3]] ^= 1
    assert reading.read(keys[order], [out], 6, 3)[1].tolist() == [2]
    assert reading.read(keys[order], [out], 6, 4)[1].tolist() == [0, 1, 2, 3]
    assert lookup.reading([loops.MappedColumn(24, memory, np.zeros(0, np.int64))], looked=0) is None


@pytest.mark.parametrize("damage", [False, True])
def test_entries_that_begin_with_pages(damage):
    """Rows, then token ids at the next multiple of 8, on pages of 512 bytes, which the table counts."""
    rng, count = np.random.default_rng(2), 20
    lengths = rng.integers(1, 30, count)
    keys = rng.integers(0, 256, (count, 32)).astype(np.uint8)
    keys = keys[np.lexsort(keys.view(">u8").T[::-1])]
    pages = (4 + 3 * rng.permutation(count)).astype(np.int64)
    memory = rng.integers(0, 256, 512 * (pages.max() + 3)).astype(np.uint8)
    sums, rows, ids = np.zeros(count, np.uint64), [], []
    for i, (page, tokens) in enumerate(zip(pages.tolist(), lengths.tolist(), strict=True)):
        begin = 512 * page + 32
        rows.append(memory[begin : begin + 20 * tokens].reshape(-1, 20).copy())
        begin += (20 * tokens + 7) // 8 * 8
        ids.append(memory[begin : begin + 4 * tokens].view("<i4").copy())
        seed = numpy_loops.first_seeds(5, keys[i : i + 1], lengths[i : i + 1])[0]
        sums[i] = chain(int(seed), ids[-1], rows[-1])
    zeros, prefix = np.zeros(1, np.int64), keys[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)
    table = LookupTable(
        *(prefix, np.ascontiguousarray(keys[:, 8:]), None, None, lengths.astype(np.uint32), pages, sums),
        *(None, zeros, zeros),
    )
    if damage:
        memory[512 * pages[3] + 33] ^= 1
        pages[5] = 2**39  # far beyond the memory
    lookup = Lookup([table], np.array([2**40]), zeros)
    located = lookup.locate(keys)
    for one, other in zip(located, by_numpy(lambda: lookup.locate(keys)), strict=True):
        np.testing.assert_array_equal(one, other)
    described = ((4, 20), (20, 0))
    columns = [loops.MappedColumn(size, memory, zeros, 512, 32, before) for size, before in described]
    order = rng.permutation(count)
    total = int(lengths.sum())
    out = [np.zeros(total, np.int32), np.zeros((total, 20), np.uint8)]
    tokens, bad = lookup.reading(columns, None).read(keys[order], out, None, 5)
    np.testing.assert_array_equal(tokens, lengths[order])
    assert bad.tolist() == sorted(np.flatnonzero(np.isin(order, [3, 5] if damage else [])))
    good = np.repeat(~np.isin(order, [3, 5] if damage else []), lengths[order])
    np.testing.assert_array_equal(out[0][good], np.concatenate([ids[i] for i in order])[good])
    np.testing.assert_array_equal(out[1][good], np.concatenate([rows[i] for i in order])[good])


@pytest.mark.parametrize("row_bytes", [768, 100, 3])
@pytest.mark.parametrize("shifted", [0, 8, 5])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_a_batch_that_is_copied_past_the_caches(row_bytes, shifted, padded):
    """Large ones are; not a byte may be left out at the edges of what the processor writes at once."""
    rng = np.random.default_rng(4)
    width = (9 << 20) // row_bytes // 25
    lengths = rng.integers(0, width + 1, 60)
    memory = rng.integers(0, 256, (width + 50) * row_bytes).astype(np.uint8)
    begins = rng.integers(0, 50, 60) * row_bytes
    offsets = np.arange(61) * width if padded else np.r_[0, np.cumsum(lengths)]
    outs = [np.full(offsets[-1] * row_bytes + shifted, 7, np.uint8)[shifted:] for _ in range(2)]
    assert outs[0].nbytes > 8 << 20
    keys, sums = rng.integers(0, 256, (60, 32)).astype(np.uint8), [np.empty(60, np.uint64) for _ in range(2)]
    columns = [Column(row_bytes, out, memory, begins) for out in outs]
    loops.gather([columns[0]], lengths, offsets, Digests(1, 3, keys, sums=sums[0]))
    by_numpy(lambda: loops.gather([columns[1]], lengths, offsets, Digests(1, 3, keys, sums=sums[1])))
    np.testing.assert_array_equal(*outs)
    np.testing.assert_array_equal(*(of[lengths > 0] for of in sums))


# --- mixing -----------------------------------------------------------------------------------------------------------


@given(
    batches(),
    st.sampled_from(["memory", "files", "direct", "both"]),
    st.integers(0, 9),
    st.sampled_from([1, 3]),
    st.integers(0, 3),
)
def test_what_is_scattered_is_what_is_gathered_and_put_there(tmp_path_factory, batch, way, more, apart, damaged):
    """Rows of several sites lie apart; digests are those of the entries, wherever their rows go."""
    lengths, _, row_bytes, begins = batch
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    rng, total = np.random.default_rng(7), int(offsets[-1])
    stored = rng.integers(0, 256, 60 * row_bytes + 8).astype(np.uint8)
    path = tmp_path_factory.getbasetemp() / f"scattered-{row_bytes}"
    path.write_bytes(stored.tobytes())
    try:
        file = os.open(path, os.O_RDONLY | (os.O_DIRECT if way == "direct" else 0))
    except OSError:  # no direct reads here
        file, way = os.open(path, os.O_RDONLY), "files"
    memory = None if way in ("files", "direct") else stored
    files = None if way == "memory" else np.full(len(lengths), file, np.int32)
    keys = rng.integers(0, 256, (len(lengths), 32)).astype(np.uint8)
    packed = np.empty((total, row_bytes), np.uint8)
    sums = np.zeros(len(lengths), np.uint64)
    plain = Column(row_bytes, packed, stored, begins)
    assert not len(loops.gather([plain], lengths, offsets, Digests(1, 3, keys, sums=sums)))
    wrong = np.flatnonzero(lengths)[:damaged]
    sums[wrong] ^= np.uint64(1)
    targets = rng.permutation(total + more)[:total]
    column = Column(row_bytes, None, memory, begins, files, begins, placing=Scattered(targets))
    for call in (lambda run: run(), by_numpy):
        buffer = np.full((total + more, apart, row_bytes), 9, np.uint8)
        out = buffer[:, apart // 2]
        bad = call(
            lambda out=out: loops.gather(
                [column._replace(out=out)],
                *(lengths, offsets, Digests(1, 3, keys, expected=sums)),
                direct=way == "direct",
            )
        )
        assert bad.tolist() == wrong.tolist()
        np.testing.assert_array_equal(out[targets], packed)
        buffer[targets, apart // 2] = 9
        assert (buffer == 9).all()
    os.close(file)


@pytest.mark.parametrize("row_bytes", [1536, 768, 100, 4])
def test_rows_that_are_scattered_past_the_caches(row_bytes):
    """A buffer that the caches cannot hold; entries that are digested before they are copied, and after."""
    rng = np.random.default_rng(6)
    lengths = rng.integers(1, (100 << 10) // row_bytes, 40)
    offsets = np.r_[0, np.cumsum(lengths)]
    memory = rng.integers(0, 256, (lengths.max() + 50) * row_bytes).astype(np.uint8)
    begins = rng.integers(0, 50, 40) * row_bytes
    room = max(int(offsets[-1]), (9 << 20) // row_bytes)
    outs = [np.full((room, row_bytes), 7, np.uint8) for _ in range(2)]
    keys, sums = rng.integers(0, 256, (40, 32)).astype(np.uint8), [np.empty(40, np.uint64) for _ in range(2)]
    targets = rng.permutation(room)[: offsets[-1]]
    columns = [Column(row_bytes, out, memory, begins, placing=Scattered(targets)) for out in outs]
    loops.gather([columns[0]], lengths, offsets, Digests(1, 3, keys, sums=sums[0]))
    by_numpy(lambda: loops.gather([columns[1]], lengths, offsets, Digests(1, 3, keys, sums=sums[1])))
    np.testing.assert_array_equal(*outs)
    np.testing.assert_array_equal(*sums)


@BOTH
@pytest.mark.parametrize("targets", [[0, 4, 1], [2**62, 1, 0], [0, 1, -1]])
def test_rows_are_scattered_nowhere_else(compiled, targets):
    memory, out = np.arange(6, dtype=np.int32).reshape(3, 2), np.full((6, 2), 9, np.int32)
    column = Column(8, out[:4], memory, np.array([0, 8]), placing=Scattered(np.array(targets)))
    with pytest.raises(IndexError):
        loops.gather([column], np.array([1, 2]), np.array([0, 1, 3]))
    assert (out[4:] == 9).all()


def test_targets_that_do_not_fit():
    memory, out = np.arange(6, dtype=np.int32).reshape(3, 2), np.zeros((4, 2), np.int32)
    lengths, offsets = np.array([1, 2]), np.array([0, 1, 3])
    for row_bytes, targets, message in (
        (8, np.array([0, 1]), "fewer targets"),
        (8, np.array([0, 1, 2], np.int32), "int64"),
        (12, np.array([0, 1, 2]), "do not fit"),
    ):
        column = Column(row_bytes, out, memory, np.array([0, 8]), placing=Scattered(targets))
        with pytest.raises(TypeError, match=message):
            loops.gather([column], lengths, offsets)


# --- pooling ----------------------------------------------------------------------------------------------------------


def pooled(how, form, at, rows, lengths, keys, sums):
    out = np.full((len(lengths) + 2, rows.shape[1]), 9, rows.dtype if how == "at" else np.float32)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    row_bytes = rows.itemsize * rows.shape[1]
    column = Column(row_bytes, out, rows, offsets[:-1] * row_bytes, placing=Pooled(how, form, at))
    bad = loops.gather([column], lengths, offsets, Digests(1, 3, keys, expected=sums))
    assert (out[len(lengths) :] == 9).all()
    assert (out[:-2][lengths == 0] == 9).all()
    return out[:-2], bad


@given(
    st.lists(st.integers(0, 200), min_size=0, max_size=6),
    st.sampled_from([1, 7, 32, 37, 96]),
    st.sampled_from(["mean", "max", "at"]),
    st.sampled_from(loops.FORMS),
    st.floats(-8, 8),
)
def test_what_is_pooled_is_what_numpy_pools(lengths, width, how, form, shift):
    """Means are as near as sums of 64 float32 are at most: 64 times half a step of them; all else is exact."""
    lengths, rng = np.array(lengths, np.int64), np.random.default_rng(9)
    numbers = (rng.standard_normal((lengths.sum(), width)) + shift).astype(np.float32)
    numbers[rng.random(numbers.shape) < 0.1] *= np.float32(1e-6)  # float16 has them without all of its digits
    rows = numbers.astype(np.float16) if form == "float16" else numbers
    if form == "bfloat16":
        rows = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        numbers = (rows.astype(np.uint32) << 16).view(np.float32)
    at = (rng.random(len(lengths)) * lengths).astype(np.int64) if how == "at" else None
    keys, sums = rng.integers(0, 256, (len(lengths), 32)).astype(np.uint8), np.zeros(len(lengths), np.uint64)
    given = how, form, at, np.ascontiguousarray(rows), lengths, keys
    pooled(*given, None)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    begins = offsets[:-1] * width * rows.itemsize
    loops.gather(
        [Column(width * rows.itemsize, memory=given[3], begins=begins)],
        lengths,
        offsets,
        Digests(1, 3, keys, sums=sums),
    )
    found, bad = pooled(*given, sums)
    wanted, _ = by_numpy(lambda: pooled(*given, sums))
    assert not len(bad)
    if how != "mean":
        np.testing.assert_array_equal(found, wanted)
        return
    begins = offsets[:-1][lengths > 0]
    if len(begins):
        sizes = np.add.reduceat(np.abs(numbers.astype(np.float64)), begins) / lengths[lengths > 0][:, None]
        wrong = np.abs(found[lengths > 0].astype(np.float64) - wanted[lengths > 0])
        assert (wrong <= 65 * 2.0**-24 * sizes).all()


@BOTH
def test_what_is_not_intact_is_pooled_and_told_of(compiled):
    rows, lengths = np.ones((5, 32), np.float32), np.array([2, 3])
    keys = np.zeros((2, 32), np.uint8)
    assert pooled("mean", "float32", None, rows, lengths, keys, np.zeros(2, np.uint64))[1].tolist() == [0, 1]


@BOTH
@pytest.mark.parametrize("at", [[2, 0], [0, -1], [0, 2**40]])
def test_positions_that_an_entry_has_not(compiled, at):
    rows, lengths, keys = np.ones((5, 8), np.float32), np.array([2, 3]), np.zeros((2, 32), np.uint8)
    with pytest.raises(IndexError):
        pooled("at", "float32", np.array(at), rows, lengths, keys, None)


def test_every_float16_is_widened_as_numpy_does(tmp_path):
    """By the processor's instruction, and column by column: rows of 33 have one that no vector takes."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    rows = np.repeat(every[:, None], 33, axis=1)
    found = pooled(
        "max", "float16", None, rows, np.ones(len(rows), np.int64), np.zeros((len(rows), 32), np.uint8), None
    )[0]
    np.testing.assert_array_equal(found, rows.astype(np.float32))


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_the_shuffle_is_numpys(count, seed):
    order = loops.permutation(count, seed)
    np.testing.assert_array_equal(order, by_numpy(lambda: loops.permutation(count, seed)))
    assert sorted(order.tolist()) == list(range(count))


def test_each_order_is_as_likely():
    drawn = np.array([loops.permutation(4, seed * 7919) for seed in range(6000)])
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - 250) ** 2 / 250).sum() < 60  # chi squared of 23 degrees: once in 30,000


# --- how many threads -------------------------------------------------------------------------------------------------


def test_the_environment_says_how_many_threads_share_a_batch():
    asked = {number: loops.threads_asked_for(number) for number in ("1", " 3 ", "16", "0064")}
    assert asked == {"1": 1, " 3 ": 3, "16": 16, "0064": 64}
    assert loops.threads_asked_for(None) == loops.threads_asked_for("") >= 1
    environment = {**os.environ, "ACTCACHE_THREADS": "5"}
    told = [sys.executable, "-c", "from actcache.io import loops; print(loops.THREADS)"]
    assert subprocess.run(told, env=environment, capture_output=True, text=True, timeout=DEADLINE).stdout == "5\n"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1e3", "²", "99999", "1\n2"])
def test_what_is_no_number_of_threads(text):
    with pytest.raises(UsageError, match="ACTCACHE_THREADS is a number of threads, 1 or more, not"):
        loops.threads_asked_for(text)


def test_the_shell_is_told_in_one_line():
    environment = {**os.environ, "ACTCACHE_THREADS": "many"}
    given = [sys.executable, "-m", "cachectl", "doctor"]
    ended = subprocess.run(given, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 2
    assert not ended.stdout
    assert ended.stderr == (
        "cachectl: error: ACTCACHE_THREADS is a number of threads, 1 or more, not 'many': set another, or unset it\n"
    )


def test_all_threads_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 40, 500)
    memory = rng.integers(0, 255, (int(lengths.sum()), 64)).astype(np.uint8)
    begins = (np.cumsum(lengths) - lengths) * 64
    offsets = np.arange(501) * 40
    made = []
    for threads in (1, 2, 7, 1000):
        monkeypatch.setattr(loops, "THREADS", threads)
        out, sums = np.full((500 * 40, 64), 9, np.uint8), np.zeros(500, np.uint64)
        digests = Digests(1, seeds=np.arange(500).astype(np.uint64), sums=sums)
        assert not len(loops.gather([Column(64, out, memory, begins)], lengths, offsets, digests))
        made.append((out.tobytes(), sums.tobytes()))
    assert len(set(made)) == 1


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(loops.missing), reason=loops.missing)
def test_float16_is_numpys():
    """All upper halves of a float32 with lower ones on both sides of each tie, and lengths around a register's."""
    for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x3001, 0x8000, 0xFFFF):
        rows = ((np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(low)).view(np.float32)
        same_as_numpy(rows)
        same_as_numpy(rows[np.abs(rows) < 65504])
    for count in (1, 7, 8, 9, 15, 16, 17, 1000):
        rows = np.random.default_rng(count).standard_normal(count, np.float32) * 1000
        same_as_numpy(rows)
        for i in (0, count // 2, count - 1):
            for bad in (np.nan, np.inf, -np.inf, 65520.0, -7e4):
                spoiled = rows.copy()
                spoiled[i] = bad
                same_as_numpy(spoiled)


def same_as_numpy(rows):
    out = np.full(len(rows) + 1, 77, np.float16)
    with np.errstate(all="ignore"):
        expected = rows.astype(np.float16)
    finite = loops.round_to_float16(rows, out[:-1])
    assert finite is None or finite == np.isfinite(expected).all()  # None: this processor has no instruction for it
    if finite is not None:
        numbers = ~np.isnan(expected)
        assert out[:-1][numbers].tobytes() == expected[numbers].tobytes()
        assert np.isnan(out[:-1][~numbers]).all()
    assert out[-1] == 77


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="nothing else here tells what the processor has")
def test_what_the_processor_has_is_used():
    """Whatever compiler made the library: one of them had it believe that there are no vectors, and all was slow."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    out = [np.zeros(8, kind) for kind in (np.float64, np.float64, np.float32)]
    pivot, norms = np.zeros(8, np.float32), np.zeros(1)
    added = loops.moments(np.ones((3, 8), np.float32), "float32", pivot, *out, norms)
    assert added == (flags >= {"avx2", "fma", "f16c"} or os.uname().machine == "aarch64")


def test_what_is_left_to_numpy():
    rows, out = np.ones((4, 6), np.float32), np.zeros((4, 6), np.float16)
    for wide, narrow in (
        (rows.astype(np.float64), out),
        (rows, out.astype(np.float32)),
        (rows.T, out.T),
        (rows[:, ::2], np.zeros((4, 3), np.float16)),
        (rows[:2], out),
        (rows.astype(">f4"), out),
        (rows[:0], out[:0]),
        (np.frombuffer(bytes(101), np.uint8)[1:97].view(np.float32).reshape(4, 6), out),
    ):
        assert loops.round_to_float16(wide, narrow) is None
    assert not out.any()
