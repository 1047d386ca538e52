"""Pruning: what was planned goes, what is protected stays, and who is at work notices nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import actcache
from actcache.admin import retention
from actcache.errors import StoreError, UsageError
from actcache.format.keys import Windows
from actcache.store.last_use import HOUR, LastUse
from tests.cli.running import by_space, cachectl
from tests.support import HIDDEN, ROOT, check, ids, key, make_store, put, recipe, rows
from tests.support.backends import each

A, B, C = recipe(), recipe(layer=2, dtype="float16"), recipe(layer=3, model="other")
DAY = 86_400


def folder(root, one):
    return root / "spaces" / one.fingerprint


def put_back(root, one, seconds, *, used=None):
    """Have a space look as if it had been written so long ago, and used so long ago."""
    for path in folder(root, one).rglob("*"):
        age = used if used is not None and path.name == "used.json" else seconds
        os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def root(tmp_path):
    """Three spaces, written 30, 20 and 10 days ago; the first was used yesterday, the others never since."""
    root = tmp_path / "store"
    with actcache.open(root) as store:
        for one in (A, B, C):
            with store.space(one) as space:
                put(space, range(20))
    for one, days in ((A, 30), (B, 20), (C, 10)):
        put_back(root, one, days * DAY, used=DAY if one is A else days * DAY)
    return root


def spaces(root):
    with actcache.open(root, "r") as store:
        return set(store.recipes())


def planned(root, **options):
    with actcache.open(root, "r") as store:
        return retention.plan_pruning(store, **options)


def size(root):
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ([], set()),
        (["--space", A.fingerprint[:8]], {A}),
        (["--space", A.fingerprint[:8], "--space", B.fingerprint], {A, B}),
        (["--where", "layer=2"], {B}),
        (["--where", "dtype=float32"], {A, C}),
        (["--where", "dtype=float32", "--where", "model=other"], {C}),
        (["--older-than", "15d"], {A, B}),
        (["--unused-for", "15d"], {B}),
        (["--unused-for", "5d"], {B, C}),
        (["--unused-for", "5d", "--where", "layer=3"], {C}),
        (["--unused-for", "12h"], {A, B, C}),
        (["--max-bytes", "1GiB"], set()),
    ],
)
def test_spaces_are_chosen(root, options, gone):
    before = size(root)
    plan = cachectl("prune", root, *options, "--dry-run", "--json").json()["plan"]
    assert {one["space"] for one in plan["spaces"] if one["removed"]} == {one.fingerprint for one in gone}
    assert spaces(root) == {A, B, C}
    assert plan["nbytes"] == before
    removed = sum(size(folder(root, one)) for one in gone)
    assert plan["freed"] == removed
    assert cachectl("prune", root, *options, "--yes").code == 0
    assert spaces(root) == {A, B, C} - gone
    assert size(root) == before - removed
    with actcache.open(root, "r") as store:
        for one in {A, B, C} - gone:
            with store.space(one) as space:
                check(space, dict.fromkeys(range(20), 0), range(25))


def test_spaces_are_told_by_their_lineage(tmp_path):
    """``dtype=`` is what ``ls`` shows: rows that were float16 once are no float32 of a fill."""
    root, wide, narrow = tmp_path / "store", recipe(dtype="float16").stored_again("float32"), recipe(dtype="float16")
    twice = wide.stored_again("bfloat16")
    with actcache.open(root) as store:
        for one in (A, wide, narrow, twice):
            store.space(one).close()
    shown = cachectl("ls", root).out
    for where, gone in (
        ("dtype=float32", {A}),
        ("dtype=float32 via float16", {wide}),
        ("dtype=bfloat16 via float16", {twice}),
        ("via=", {A, narrow}),
        ("via=float16", {wide, twice}),
    ):
        done = cachectl("prune", root, "--where", where, "--dry-run", "--json", "--idle", 0)
        found = {one["space"] for one in done.json()["plan"]["spaces"] if one["removed"]}
        assert (found, done.err) == ({one.fingerprint for one in gone}, ""), where
        assert "dtype" not in where or where.removeprefix("dtype=") in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["via=None"], "no space fits --where via=None; there are via="),
        (["dtype=fp16"], "no space fits --where dtype=fp16; there are dtype=float16, dtype=float32"),
        (["layer=9", "model=other"], "no space fits --where layer=9; there are layer=1, layer=2, layer=3"),
        (["layer=2", "model=other"], "no space fits --where layer=2 and model=other; there are layer=1, "),
        (["layer=2", "--space", A.fingerprint], "no space fits --where layer=2; there are layer=1"),
        (["layer=9", "--older-than", "1s", "--keep-collection", "c"], "no space fits --where layer=9"),
    ],
    ids=str,
)
def test_fields_that_choose_no_space_are_told(root, options, said):
    with actcache.open(root) as store:
        store.put_collection("c", [key(1)])
    arguments = [text for one in options for text in (["--where", one] if "=" in one else [one])]
    for more in (["--dry-run"], ["--yes"], ["--yes", "--json"], ["--yes", "--quiet"]):
        done = cachectl("prune", root, *arguments, *more)
        assert done.code == 0
        assert done.err.startswith(said), done.err
        assert "no space" not in done.out
    assert spaces(root) == {A, B, C}
    fits = cachectl("prune", root, "--where", "layer=2", "--unused-for", "900d", "--yes")
    assert fits.err == ""  # it is the age that none has


def test_a_budget_takes_the_least_recently_used_first(root):
    """B was not used for 20 days, C for 10, A for one, though A is the oldest."""
    sizes = {one: size(folder(root, one)) for one in (A, B, C)}
    rest = size(root) - sum(sizes.values())
    for budget, left in (
        (rest + sum(sizes.values()), {A, B, C}),
        (rest + sum(sizes.values()) - 1, {A, C}),
        (rest + sizes[A] + sizes[C], {A, C}),
        (rest + sizes[A] + sizes[C] - 1, {A}),
        (rest, set()),
    ):
        done = cachectl("prune", root, "--max-bytes", budget, "--yes", "--json").json()
        assert spaces(root) == left
        assert size(root) <= budget
        assert done["plan"]["max_bytes"] == budget
    assert "more than --max-bytes" in cachectl("prune", root, "--max-bytes", rest - 1).refused(3)


def test_a_budget_that_pins_do_not_allow(root):
    cachectl("pin", root, B.fingerprint, C.fingerprint[:6])
    result = cachectl("prune", root, "--max-bytes", 1, "--yes")
    assert "more than --max-bytes" in result.refused(3)
    assert result.out.count("pinned") == 2
    assert spaces(root) == {B, C}
    assert cachectl("prune", root, "--space", B.fingerprint, "--yes").code == 0
    assert spaces(root) == {B, C}
    unpinned = cachectl("unpin", root, B.fingerprint, "--json").json()
    assert unpinned == {"store": str(root), "spaces": [{"space": B.fingerprint, "pinned": False}]}
    put_back(root, B, 20 * DAY)
    cachectl("prune", root, "--space", B.fingerprint, "--yes")
    assert spaces(root) == {C}
    assert "no space begins with" in cachectl("pin", root, "zz").refused(2)


def test_arguments_that_make_no_sense(root):
    for options, said in (
        (["--where", "color=red"], "config"),
        (["--where", "layer"], "FIELD=VALUE"),
        (["--where", "dtype=float32", "--where", "dtype=float16"], "no space is both"),
        (["--older-than", "soon"], "30d"),
        (["--max-bytes", "little"], "8GiB"),
        (["--max-bytes", "1", "--keep-collection", "c"], "collection"),
        (["--keep-only", root / "none", "--keep-collection", "c"], "one after the other"),
        (["--keep-only", root / "none"], "cannot read"),
        (["--space", "zz"], "no space begins with"),
    ):
        code = 3 if said == "collection" else 2
        line = cachectl("prune", root, *options, "--yes").refused(code)
        assert said in line or "field" in line
    with pytest.raises(UsageError):
        planned(root, max_bytes=1, keep_only=[key(1)])
    assert spaces(root) == {A, B, C}


def test_without_a_terminal_it_needs_yes(root):
    assert "--yes" in cachectl("prune", root, "--where", "layer=2", text="y\n").refused(2)
    assert spaces(root) == {A, B, C}


@pytest.mark.parametrize(("answer", "left"), [("y", {A, C}), ("n", {A, B, C}), ("", {A, B, C})])
def test_on_a_terminal_it_asks(root, answer, left):
    result = cachectl("prune", root, "--where", "layer=2", text=f"{answer}\n", typed=True)
    assert result.code == 0, result.err
    assert "Delete this?" in result.err
    assert result.out.startswith(f"delete {B.fingerprint[:12]}: all")
    assert spaces(root) == left


def test_what_killed_writers_left_behind(root):
    (root / "tmp").mkdir(exist_ok=True)
    for name, age in (("old", 2 * DAY), ("young", 60)):
        (root / "tmp" / name).write_bytes(bytes(1000))
        os.utime(root / "tmp" / name, (time.time() - age,) * 2)
    assert planned(root).temporary == 1000
    # ctime cannot be put back, and a sweep goes by it, so nothing is old enough for it yet
    assert cachectl("prune", root, "--dry-run").out.count("temporary files: 1,000 B") == 1


def test_left_behind_says_how_old(root):
    (root / "tmp").mkdir(exist_ok=True)
    (root / "tmp" / "young").write_bytes(bytes(1000))
    for age, left in (("1h", ["young"]), ("0", [])):
        result = cachectl("prune", root, "--left-behind", age, "--yes")
        assert result.code == 0, result.err
        assert sorted(os.listdir(root / "tmp") if (root / "tmp").exists() else []) == left
    assert spaces(root) == {A, B, C}
    assert cachectl("prune", root, "--left-behind", "soon").code == 2


# --- a corpus ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    return make_texts(tmp_path / "texts", tmp_path / "texts")


def make_texts(root, url):
    with actcache.open(url) as store, store.space(A) as space:
        space.put([key(n) for n in range(20)], [rows(n) for n in range(20)], [ids(n) for n in range(20)])
        store.put_collection("half", [key(n) for n in range(0, 20, 2)])
    put_back(root, A, DAY)
    return root


@each()
def test_only_a_collection_is_kept_in_every_backend(kind, tmp_path):
    """Planning a pruning, which opens the space, is nobody at work."""
    url = kind.url(tmp_path / "store")
    make_texts(tmp_path / "store", url)
    done = cachectl("prune", url, "--keep-collection", "half", "--yes", "--json").json()["done"]
    assert [(one["space"], one["entries"]) for one in done["spaces"]] == [(A.fingerprint, 10)]
    with actcache.open(url, "r") as store, store.space(A) as space:
        check(space, dict.fromkeys(range(0, 20, 2), 0), range(25))


@pytest.mark.parametrize("how", ["lines", "jsonl", "collection"])
def test_only_a_corpus_is_kept(texts, tmp_path, how):
    kept = range(0, 20, 2)
    source = tmp_path / "corpus"
    if how == "lines":
        source.write_text("\n".join(f"document {n}" for n in [*kept, 77]))
        options = ["--keep-only", source]
    elif how == "jsonl":
        source.write_text("\n".join(json.dumps({"body": f"document {n}"}) for n in kept))
        options = ["--keep-only", source, "--field", "body"]
    else:
        options = ["--keep-collection", "half"]
    plan = cachectl("prune", texts, *options, "--dry-run", "--json").json()["plan"]
    assert [(one["entries"], one["why"]) for one in plan["spaces"]] == [(10, "not in the corpus")]
    done = cachectl("prune", texts, *options, "--yes", "--json").json()["done"]
    assert [(one["space"], one["entries"]) for one in done["spaces"]] == [(A.fingerprint, 10)]
    with actcache.open(texts, "r") as store, store.space(A) as space:
        check(space, dict.fromkeys(kept, 0), range(25))
    put_back(texts, A, DAY)
    assert cachectl("prune", texts, *options, "--yes", "--json").json()["plan"]["spaces"] == []


def test_a_corpus_that_is_another_one_deletes_nothing(texts, tmp_path):
    (tmp_path / "other").write_text("something else\n")
    result = cachectl("prune", texts, "--keep-only", tmp_path / "other", "--yes")
    assert "none of the corpus is in it" in result.out
    with actcache.open(texts, "r") as store, store.space(A) as space:
        assert len(space) == 20


def test_windows_of_a_corpus(tmp_path):
    """A document's windows stay with it, those of one that is not complete too; the stride has to be said."""
    one, spec = recipe(max_length=10, too_long="windows"), Windows(10, 3)
    documents = [key(n) for n in range(4)]
    whole = [name for document in documents[:3] for name in spec.keys(document, 3)]
    broken = spec.keys(documents[3], 3)[:2]
    with actcache.open(tmp_path / "store") as store, store.space(one) as space:
        space.put([*whole, *broken], [rows(n) for n in range(11)])
    put_back(tmp_path / "store", one, DAY)
    (tmp_path / "corpus").write_text("document 1\ndocument 3\n")
    options = ["--keep-only", tmp_path / "corpus", "--yes"]
    assert "stride" in cachectl("prune", tmp_path / "store", *options).out
    assert "none of the corpus" in cachectl("prune", tmp_path / "store", *options, "--stride", 0).out
    cachectl("prune", tmp_path / "store", *options, "--stride", 3)
    with actcache.open(tmp_path / "store", "r") as store, store.space(one) as space:
        assert sorted(space.keys()) == sorted([*spec.keys(documents[1], 3), *broken])


# --- who is at work ---------------------------------------------------------------------------------------------------


def test_what_was_written_or_read_a_moment_ago_stays(tmp_path):
    root = tmp_path / "store"
    make_store(root, range(5))
    assert "somebody may be at work" in cachectl("prune", root, "--where", "layer=1", "--yes").out
    put_back(root, A, DAY)
    (folder(root, A) / "used.json").unlink()
    with actcache.open(root) as store, store.space(A) as space:
        space.get([key(1)])
    for path in (folder(root, A) / "segments").iterdir():  # the mark of the use is the only young one
        os.utime(path, (time.time() - DAY,) * 2)
    os.utime(folder(root, A) / "recipe.json", (time.time() - DAY,) * 2)
    assert "somebody may be reading" in cachectl("prune", root, "--where", "layer=1", "--yes").out
    assert spaces(root) == {A}
    cachectl("prune", root, "--where", "layer=1", "--yes", "--idle", 0)
    assert spaces(root) == set()


def test_what_changed_since_the_plan_stays(root):
    plan = planned(root, where={"dtype": "float32"})
    assert [removal.fingerprint for removal in plan.removals] == sorted([A.fingerprint, C.fingerprint])
    with actcache.open(root) as store:
        retention.pin(store, [A.fingerprint])
        with store.space(C) as space:
            put(space, [99])
        done = retention.prune(store, plan)
    assert set(done.skipped) == {A.fingerprint, C.fingerprint}
    assert spaces(root) == {A, B, C}


@each(everyday=("hdf5", "lmdb"))
def test_a_reader_and_a_writer_at_work_lose_nothing(kind, tmp_path):
    """Budget after budget is enforced on old spaces while two others are read and written all the time."""
    root = tmp_path / "store"
    url = kind.url(root)
    make_store(url, range(40))
    stop, failures, written = threading.Event(), [], []

    def reading():
        try:
            with actcache.open(url) as store, store.space(A) as space:
                while not stop.is_set():
                    check(space, dict.fromkeys(range(40), 0), range(45))
                    space.refresh()
        except BaseException as error:
            failures.append(error)

    def writing():
        try:
            with actcache.open(url) as store, store.space(C) as space:
                while not stop.is_set():
                    put(space, [len(written)])
                    space.flush()
                    written.append(len(written))
                    time.sleep(0.02)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for work in (reading, writing)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            old = recipe(layer=10 + number)
            make_store(url, range(30), layer=10 + number)
            put_back(root, old, DAY)
            with actcache.open(url) as store:
                done = retention.prune(store, retention.plan_pruning(store, max_bytes=1))
            assert done.spaces == [old.fingerprint]
            time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(written) > 3
    with actcache.open(url, "r") as store:
        assert set(store.recipes()) == {A, C}
        with store.space(C) as space:
            check(space, dict.fromkeys(written, 0), range(len(written) + 5))


AT_WORK = """
import select, sys, time
import actcache
from tests.support import *

def told_to_stop():
    return select.select([sys.stdin], [], [], 0)[0]

def read(space):
    held = dict.fromkeys(range(40), 0)
    while not told_to_stop():
        check(space, held, range(45))  # bit by bit, and from a mapping that stays
        space.refresh()
        print("right", flush=True)

def write(space):
    n = 0
    while not told_to_stop():
        put(space, [n])
        space.flush()
        print(n, flush=True)
        n += 1
        time.sleep(0.02)

with actcache.open(sys.argv[1]) as store:
    read(store.space(recipe())) if sys.argv[2] == "read" else write(store.space(recipe(layer=3, model="other")))
"""


def at_work(url, what):
    command = [sys.executable, "-c", AT_WORK, url, what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@each(everyday=("hdf5", "lmdb"))
def test_a_budget_is_kept_while_other_processes_read_and_fill(kind, tmp_path):
    """The command takes what was not used longest and ends within the budget; nobody at work loses a bit."""
    root = tmp_path / "store"
    url = kind.url(root)
    make_store(url, range(40))
    old = [recipe(layer=10 + number) for number in range(3)]
    with actcache.open(url) as store:
        for one in old:
            with store.space(one) as space:
                space.put([key(0)], [np.ones((1 << 18, HIDDEN), np.float32)])  # 8 MiB
    for days, one in zip((30, 10, 20), old, strict=True):
        put_back(root, one, days * DAY)
    each_takes = size(folder(root, old[0]))
    with at_work(url, "read") as reader, at_work(url, "write") as writer:
        assert reader.stdout.readline() == "right\n"
        assert writer.stdout.readline() == "0\n"
        budget = size(root) - 3 * each_takes // 2  # half a space is room for the writer
        result = cachectl("prune", url, "--max-bytes", budget, "--yes", "--json", "--idle", "60s")
        assert reader.poll() is writer.poll() is None  # still at work
        for process in (reader, writer):
            process.stdin.close()
        assert set(reader.stdout.read().split()) == {"right"}
        written = [0, *map(int, writer.stdout.read().split())]
    assert (result.code, reader.returncode, writer.returncode) == (0, 0, 0), result.err
    done = result.json()
    assert list(by_space(done["done"])) == [old[0].fingerprint, old[2].fingerprint]
    assert done["done"]["nbytes"] <= budget
    assert size(root) <= budget
    with actcache.open(url, "r") as store:
        assert set(store.recipes()) == {A, C, old[1]}
        with store.space(A) as space:
            check(space, dict.fromkeys(range(40), 0), range(45))
        with store.space(C) as space:
            check(space, dict.fromkeys(written, 0), range(len(written) + 5))
            assert space.verify().intact


def test_a_space_that_is_larger_than_the_budget(root):
    """Whole spaces go, and the plan says so before anybody agrees; what stands in the way is named, with what helps."""
    largest = max(size(folder(root, one)) for one in (A, B, C))
    out = cachectl("prune", root, "--max-bytes", largest - 1, "--dry-run").out
    assert "it alone takes more than the budget" in out
    cachectl("pin", root, B.fingerprint)
    with actcache.open(root) as store, store.space(C) as space:
        put(space, [77])
    line = cachectl("prune", root, "--max-bytes", 1000, "--yes").refused(3)
    assert "1 space pinned (see cachectl unpin)" in line
    assert "1 space in use (prune again later, or with --idle 0)" in line
    assert spaces(root) == {B, C}
    line = cachectl("prune", root, "--max-bytes", 1000, "--where", "layer=99", "--yes").refused(3)
    assert "these options do not choose" in line


# --- the mark of a use ------------------------------------------------------------------------------------------------


def test_uses_are_noted_once_an_hour(tmp_path, monkeypatch):
    make_store(tmp_path / "store", range(5))
    mark = folder(tmp_path / "store", A) / "used.json"
    assert mark.exists()  # putting is a use
    mark.write_text(json.dumps({"used": time.time() - 2 * HOUR}))
    with actcache.open(tmp_path / "store", "r") as store, store.space(A) as space:
        space.get([key(1)])
    assert json.loads(mark.read_text())["used"] < time.time() - HOUR  # who only reads leaves no trace
    with actcache.open(tmp_path / "store") as store, store.space(A) as space:
        space.leave_no_trace()
        space.get([key(1)])
        assert json.loads(mark.read_text())["used"] < time.time() - HOUR
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with actcache.open(tmp_path / "store") as store, store.space(A) as space:
        space.get([key(1)])
        first = json.loads(mark.read_text())["used"]
        assert abs(first - time.time()) < 60
        for seconds, noted in ((HOUR - 10, False), (20, True)):
            mark.write_text(json.dumps({"used": 1}))
            clock[0] += seconds
            list(space.reader([key(1)], depth=0))
            assert (json.loads(mark.read_text())["used"] > 1) == noted


@pytest.mark.parametrize("text", ["", "[]", "{", '{"used": "x"}', '{"used": 1e400}', "[" * 5000])
def test_a_damaged_mark_is_no_failure(tmp_path, text):
    make_store(tmp_path / "store", range(5))
    mark = folder(tmp_path / "store", A) / "used.json"
    mark.write_text(text)
    with actcache.open(tmp_path / "store") as store, store.space(A) as space:
        assert space.get([key(1)])[0] is not None
    assert json.loads(mark.read_text())["used"] > 1


def test_a_mark_that_cannot_be_written_is_no_failure():
    class Broken:
        def read_blob(self, name):
            raise StoreError("no")

    LastUse(Broken(), "x", writable=True).note()


def test_a_damaged_space_goes_by_its_name(root):
    (folder(root, A) / "recipe.json").write_text("{")
    put_back(root, A, DAY)
    cachectl("prune", root, "--space", A.fingerprint[:10], "--yes")
    assert spaces(root) == {B, C}
    assert not folder(root, A).exists()


def test_states(root):
    with actcache.open(root, "r") as store:
        found = {state.fingerprint: state for state in retention.space_states(store)}
    for one, days, used in ((A, 30, 1), (B, 20, 20), (C, 10, 10)):
        state = found[one.fingerprint]
        assert state.recipe == one
        np.testing.assert_allclose(
            [state.written, state.made, state.used], [days * DAY, days * DAY, used * DAY], atol=60
        )
        assert state.nbytes == size(folder(root, one))
        assert not state.pinned
