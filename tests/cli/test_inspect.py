"""``cachectl inspect`` of a space, a segment and a document, and ``ls --tree``: against what was put."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import signal

import h5py
import numpy as np
import pytest

import actcache
from actcache import codec, reporting
from actcache.cli.progress import Meter
from actcache.errors import MissingEntryError, UsageError
from actcache.reporting.statistics import Numbers
from actcache.reporting.words import moment
from tests.backends import each
from tests.cli.running import cachectl
from tests.support import compact, ids, key, length, make_store, put, recipe, rows, segment_files

COUNT = 30
NAME = recipe().fingerprint


def strict(result):
    """JSON as RFC 8259 has it: no NaN, no Infinity."""

    def refuse(constant):
        raise AssertionError(constant)

    assert result.code in (0, 4), result.err
    return json.loads(result.out, parse_constant=refuse)


@pytest.fixture
def store(tmp_path):
    url = tmp_path / "store"
    make_store(url, range(COUNT), segments=3)
    return url


def damage(path, entry=0):
    """Change one bit of the rows of a segment's entry; return the entry's key."""
    with h5py.File(path) as file:
        begin = file["values"].id.get_offset() + int(file["offsets"][entry]) * 8 * 4
        name = file["keys"][entry].tobytes()
    data = bytearray(path.read_bytes())
    data[begin] ^= 1
    path.write_bytes(data)
    return name


# --- a space ----------------------------------------------------------------------------------------------------------


@each()
def test_a_space_in_full(kind, tmp_path):
    url = kind.url(tmp_path / "store")
    make_store(url, range(COUNT), segments=3, provenance={"device": "abacus"})
    with actcache.open(url) as opened, opened.space(recipe()) as space:
        put(space, range(5), version=1, overwrite=True)
        space.delete([key(29)])
    found = strict(cachectl("inspect", url, "--space", NAME[:8], "--all", "--json"))
    (space,) = found["spaces"]
    held = {n: rows(n, 1 if n < 5 else 0) for n in range(COUNT - 1)}
    lengths = np.array([len(values) for values in held.values()])
    everything = np.concatenate(list(held.values())).astype(np.float64)
    assert (space["entries"], space["tokens"]) == (len(held), lengths.sum())
    assert space["provenance"]["device"] == "abacus"
    assert space["identity"]["layer"] == 1
    assert space["owner"] == pwd.getpwuid(os.geteuid()).pw_name
    assert 0 <= space["written"] <= space["made"] + 1 < 600
    assert space["computed_bytes"] == lengths.sum() * 8 * 4
    assert space["bytes_per_token"] == pytest.approx(space["nbytes"] / lengths.sum())
    assert space["ratio"] == pytest.approx(space["nbytes"] / everything.size / 4)

    told = space["lengths"]
    assert (told["shortest"], told["longest"], told["mean"]) == (lengths.min(), lengths.max(), lengths.mean())
    assert told["median"] == np.median(lengths)
    assert (lengths <= told["p95"]).mean() >= 0.95 > (lengths < told["p95"]).mean()
    counts, _ = np.histogram(lengths, told["histogram"]["edges"])
    assert told["histogram"]["counts"] == counts.tolist()
    assert sum(counts) == len(held)

    sample = space["sample"]
    assert (sample["entries"], sample["of"], sample["corrupt"]) == (len(held), len(held), [])
    statistics, norms = sample["statistics"], np.linalg.norm(everything, axis=1)
    assert statistics["mean"] == pytest.approx(everything.mean())
    assert statistics["std"] == pytest.approx(everything.std())
    for name, norm in (("norm_min", norms.min()), ("norm_mean", norms.mean()), ("norm_max", norms.max())):
        assert statistics[name] == pytest.approx(norm)
    assert sum(statistics["norms"]["counts"]) == len(norms)

    segments = space["segment_list"]
    assert sum(one["entries"] for one in segments) == len(held)
    assert sum(one["tokens"] for one in segments) == lengths.sum()
    if kind.segmented:
        folder = tmp_path / "store" / "spaces" / NAME
        assert {one["name"] for one in segments} == {path.name for path in segment_files(folder)}
    shown = cachectl("inspect", url, "--space", NAME[:8]).out
    for fact in ("abacus", f"{len(held)} entries", "tokens of an entry: 1 to 9", "norms", "0 NaN", "intact", "█"):
        assert fact in shown
    assert found["store"] == url


def test_segments_are_what_their_files_say(store):
    folder = store / "spaces" / NAME
    os.utime(segment_files(folder)[1], (0, segment_files(folder)[1].stat().st_mtime - 3600))
    (space,) = strict(cachectl("inspect", store, "--space", NAME, "--json"))["spaces"]
    for one, path in zip(space["segment_list"], segment_files(folder), strict=True):
        with h5py.File(path) as file:
            assert (one["entries"], one["tokens"]) == (len(file["keys"]), len(file["values"]))
        assert (one["name"], one["nbytes"], one["state"]) == (path.name, path.stat().st_size, "served")
    assert [round(one["age"] / 3600) for one in space["segment_list"]] == [0, 1, 0]


def test_a_sample_is_drawn_by_its_seed(store):
    def drawn(*options):
        return strict(cachectl("inspect", store, "--space", NAME, "--json", *options))["spaces"][0]["sample"]

    assert drawn("--sample", 7) == drawn("--sample", 7)
    assert (drawn("--sample", 7)["entries"], drawn("--sample", 7)["of"]) == (7, COUNT)
    assert len({json.dumps(drawn("--sample", 7, "--seed", seed)) for seed in range(5)}) > 1
    nothing = drawn("--sample", 0)
    assert (nothing["entries"], nothing["statistics"]["norm_min"], nothing["corrupt"]) == (0, None, [])
    with actcache.open(store, "r") as opened:
        for options in ({"sample": -1}, {"seed": -1}):
            with pytest.raises(UsageError):
                reporting.survey(opened, **options)
    cachectl("inspect", store, "--space", NAME, "--sample", -1).refused(2)


def test_what_is_corrupt_is_named_and_left_out(store):
    bad = {damage(segment_files(store / "spaces" / NAME)[1], entry) for entry in (0, 3)}
    result = cachectl("inspect", store, "--space", NAME, "--all", "--json")
    assert result.code == 4
    sample = strict(result)["spaces"][0]["sample"]
    assert {bytes.fromhex(name) for name in sample["corrupt"]} == bad
    good = [n for n in range(COUNT) if key(n) not in bad]
    everything = np.concatenate([rows(n) for n in good]).astype(np.float64)
    assert sample["statistics"]["tokens"] == len(everything)
    assert sample["statistics"]["std"] == pytest.approx(everything.std())
    shown = cachectl("inspect", store, "--space", NAME, "--all")
    assert "2 fail their checksums" in shown.out
    assert all(name.hex() in shown.out for name in bad)
    assert cachectl("inspect", store, "--space", NAME, "--sample", 0).code == 0
    assert cachectl("inspect", store).code == 0  # reads no entries


def test_what_is_no_number_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "_all_finite", lambda rows: True)
    values = np.ones((5, 8), np.float32)
    values[0, :3], values[1, 0], values[2, 0], values[3] = np.nan, np.inf, -np.inf, 0
    with actcache.open(tmp_path / "store") as opened, opened.space(recipe()) as space:
        space.put([key(0)], [values])
    statistics = strict(cachectl("inspect", tmp_path / "store", "--space", NAME, "--json"))["spaces"][0]["sample"]
    statistics = statistics["statistics"]
    assert (statistics["nan"], statistics["infinite"], statistics["zero_rows"]) == (3, 2, 1)
    assert (statistics["norm_min"], statistics["norm_max"]) == (0, pytest.approx(8**0.5))
    assert statistics["mean"] == pytest.approx(values[np.isfinite(values)].mean())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_statistics_piece_by_piece_are_those_of_the_whole(dtype):
    """Also where the mean is far larger than the deviation, and beyond what squares in float32 hold."""
    rng = np.random.default_rng(3)
    scale = 1e4 if dtype == np.float16 else 1e30
    for values in (rng.normal(100, 0.1, (5000, 16)), rng.normal(0, scale, (400, 16))):
        given = values.astype(dtype)
        numbers = Numbers()
        for part in np.array_split(given, 7):
            numbers.add(part)
        found, wide = numbers.statistics(), given.astype(np.float64)
        assert found.mean == pytest.approx(wide.mean(), rel=1e-9, abs=1e-9 * scale)
        assert found.std == pytest.approx(wide.std(), rel=1e-9)
        norms = np.linalg.norm(wide, axis=1)
        assert (found.norm_min, found.norm_max) == (pytest.approx(norms.min()), pytest.approx(norms.max()))
        counts, _ = np.histogram(norms, found.norms.edges)
        assert list(found.norms.counts) == counts.tolist()
        assert len(counts) <= 32


@pytest.mark.parametrize("longest", [1, 7, 24, 25, 512, 8192, 10**9])
def test_lengths_are_counted_in_round_ranges(longest):
    lengths = np.random.default_rng(longest).integers(1, longest + 1, 1000)
    lengths[0] = longest
    found = reporting.Lengths.of(lengths).histogram
    widths = set(np.diff(found.edges).tolist())
    assert len(widths) == 1
    assert str(int(widths.pop())).rstrip("0") in ("1", "2", "5")
    assert len(found.counts) <= 24
    assert list(found.counts) == np.histogram(lengths, found.edges)[0].tolist()
    assert sum(found.counts) == 1000


# --- a segment --------------------------------------------------------------------------------------------------------


@each()
def test_a_segment(kind, tmp_path):
    url = kind.url(tmp_path / "store")
    make_store(url, range(COUNT), segments=3, provenance={"device": "abacus"})
    listed = strict(cachectl("inspect", url, "--space", NAME, "--json"))["spaces"][0]["segment_list"]
    for one in listed:
        found = strict(cachectl("inspect", url, "--segment", one["name"], "--json", "--all"))
        assert {**found["segment"], "age": 0} == {**one, "age": 0}
        assert found["sample"]["entries"] == one["entries"] == found["lengths"]["entries"]
        assert found["sample"]["statistics"]["tokens"] == one["tokens"]
        assert (found["space"], found["intact"]) == (NAME, True)
    shown = cachectl("inspect", url, "--segment", listed[0]["name"]).out
    for fact in (listed[0]["name"], f"by {getpass.getuser()}", "abacus", "served", "intact"):
        assert fact in shown


def test_segments_that_are_replaced_damaged_or_not_there(store):
    folder = store / "spaces" / NAME
    first, second, third = (path.name for path in segment_files(folder))
    assert cachectl("inspect", store, "--segment", first.split(".")[0]).code == 0
    damage(folder / "segments" / second)
    result = cachectl("inspect", store, "--segment", second, "--all", "--json")
    assert (result.code, len(strict(result)["sample"]["corrupt"])) == (4, 1)
    data = (folder / "segments" / third).read_bytes()
    (folder / "segments" / third).write_bytes(data[:-50])
    result = cachectl("inspect", store, "--segment", third, "--json")
    assert (result.code, strict(result)["segment"]["state"]) == (4, "damaged")
    assert "truncated" in cachectl("inspect", store, "--segment", third).out
    (folder / "segments" / third).write_bytes(data)
    with actcache.open(store) as opened, opened.space(recipe()) as space:
        space.repair()
        compact(space, grace=600)
    shown = strict(cachectl("inspect", store, "--segment", first, "--json"))
    assert (shown["segment"]["state"], shown["segment"]["entries"]) == ("unused", 0)
    assert "segments begin with 0000" in cachectl("inspect", store, "--segment", "0000").refused(2)
    for name in ("ffff", ""):
        assert "ls --tree" in cachectl("inspect", store, "--segment", name).refused(2)


# --- a document -------------------------------------------------------------------------------------------------------


@each()
def test_a_document(kind, tmp_path):
    url = kind.url(tmp_path / "store")
    make_store(url, range(COUNT))
    make_store(url, range(5, 8), layer=2, dtype="float16")
    n = 6
    found = strict(cachectl("inspect", url, "--text", f"document {n}", "--json"))
    assert found["key"] == key(n).hex()
    entries = {one["space"]: one for one in found["entries"]}
    assert set(entries) == {NAME, recipe(layer=2, dtype="float16").fingerprint}
    one = entries[NAME]
    assert (one["tokens"], one["dtype"], one["hidden_size"]) == (length(n), "float32", 8)
    assert one["token_ids"] == ids(n).tolist()
    assert one["nbytes"] == length(n) * (8 * 4 + 4)
    assert one["intact"]
    assert one["statistics"]["mean"] == pytest.approx(rows(n).mean())
    with actcache.open(url, "r") as opened, opened.space(recipe()) as space:
        assert int(one["checksum"], 16) == space.checksums([key(n)])[0]
    names = [
        path.name for path in (tmp_path / "store" / "spaces" / NAME).glob("segments/*" if kind.segmented else "*/*")
    ]
    assert one["segment"] in names
    assert [one["space"] for one in strict(cachectl("inspect", url, "--key", key(29).hex(), "--json"))["entries"]] == [
        NAME
    ]
    for option in (("--key", key(n).hex()), ("--key", key(n).hex()[:11].upper())):
        assert strict(cachectl("inspect", url, *option, "--json")) == found
    only = strict(cachectl("inspect", url, "--text", f"document {n}", "--space", NAME, "--json"))
    assert only["entries"] == [one]
    shown = cachectl("inspect", url, "--text", f"document {n}").out
    for fact in (key(n).hex(), f"{length(n)} tokens x 8 float32", one["segment"], "intact", str(ids(n)[0])):
        assert fact in shown


def test_a_document_with_spans(store):
    spans = np.arange(6).reshape(3, 2)
    with actcache.open(store) as opened, opened.space(recipe()) as space:
        space.put([key(99)], [np.ones((3, 8), np.float32)], spans=[spans], word_ids=[[-1, 0, 1]])
    (one,) = strict(cachectl("inspect", store, "--text", "document 99", "--json"))["entries"]
    assert one["extras"] == {"spans": spans.tolist(), "word_ids": [-1, 0, 1]}
    assert one["token_ids"] is None
    assert one["nbytes"] == 3 * (8 * 4 + 8 + 4)
    assert "spans [0,1] [2,3] [4,5]" in cachectl("inspect", store, "--text", "document 99").out


def test_a_document_in_windows(tmp_path):
    """Found without being told the stride, which a space's recipe does not name."""
    url, changes = tmp_path / "store", {"too_long": "windows", "max_length": 9}
    specs = {3: 4, 0: 2}  # stride -> windows
    with actcache.open(url) as opened, opened.space(recipe(**changes)) as space:
        for stride, count in specs.items():
            put_windows(space, key(0), actcache.windows(9, stride), count)
        put_windows(space, key(1), actcache.windows(9, 3), 1)
    found = strict(cachectl("inspect", url, "--text", "document 0", "--json"))
    seen = [(one["window"]["stride"], one["window"]["number"], one["window"]["last"]) for one in found["entries"]]
    assert seen == [(0, 0, False), (0, 1, True), (3, 0, False), (3, 1, False), (3, 2, False), (3, 3, True)]
    assert [one["tokens"] for one in found["entries"]] == [1, 2, 1, 2, 3, 4]
    keys = actcache.windows(9, 3).keys(key(0), 4)
    assert [one["key"] for one in found["entries"]][2:] == [name.hex() for name in keys]
    assert strict(cachectl("inspect", url, "--key", key(0).hex(), "--json")) == found
    (alone,) = strict(cachectl("inspect", url, "--key", keys[2].hex()[:20], "--json"))["entries"]
    assert (alone["tokens"], alone["window"]) == (3, None)
    shown = cachectl("inspect", url, "--text", "document 1").out
    assert "window 0, the last" in shown
    with actcache.open(url) as opened, opened.space(recipe(**changes)) as space:
        space.delete([keys[1]])
    found = strict(cachectl("inspect", url, "--text", "document 0", "--json"))
    assert [one["window"]["stride"] for one in found["entries"]] == [0, 0, 3]  # as far as they go


def put_windows(space, document, spec, count):
    space.put(spec.keys(document, count), [np.full((1 + n, 8), n + 1, np.float32) for n in range(count)])


def test_documents_that_are_not_there(store):
    line = cachectl("inspect", store, "--text", "another").refused(3)
    assert "has no entry for the text 'another': looked into 1 space" in line
    cachectl("inspect", store, "--key", "0" * 64).refused(3)
    absent = next(f"{n:03x}" for n in range(4096) if not any(key(i).hex().startswith(f"{n:03x}") for i in range(COUNT)))
    assert f"begins with {absent}" in cachectl("inspect", store, "--key", absent).refused(3)
    for wrong in ("", "xyz", "0" * 65, "0x12"):
        assert "hexadecimal" in cachectl("inspect", store, "--key", wrong).refused(2)
    digits = [key(n).hex()[0] for n in range(COUNT)]
    doubled = next(digit for digit in digits if digits.count(digit) > 1)
    assert f"{digits.count(doubled)} keys begin with {doubled}" in cachectl("inspect", store, "--key", doubled).refused(
        2
    )
    cachectl("inspect", store, "--text", "").refused(2)
    with actcache.open(store, "r") as opened, pytest.raises(MissingEntryError):
        reporting.document_by_text(opened, "another")


def test_a_corrupt_document(store):
    bad = damage(segment_files(store / "spaces" / NAME)[0], 2)
    result = cachectl("inspect", store, "--key", bad.hex(), "--json")
    assert result.code == 4
    (one,) = strict(result)["entries"]
    assert (one["intact"], one["statistics"], one["token_ids"]) == (False, None, None)
    assert "CORRUPT" in cachectl("inspect", store, "--key", bad.hex()).out


# --- bad places -------------------------------------------------------------------------------------------------------

DETAILS = (["--space", NAME[:6]], ["--segment", "0000"], ["--text", "x"], ["--key", "ab"], ["--html", "{new}"])
each_detail = pytest.mark.parametrize("option", DETAILS, ids=lambda option: option[0])


def looked(option, store, tmp_path, *more):
    result = cachectl("inspect", store, *(part.format(new=tmp_path / "new.html") for part in option), *more)
    assert "Traceback" not in result.err
    return result


@each_detail
def test_bad_places(option, tmp_path):
    looked(option, tmp_path / "none", tmp_path).refused(3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    looked(option, tmp_path / "folder", tmp_path).refused(3)
    looked(option, tmp_path / "folder" / "file", tmp_path).refused(3)
    make_store(tmp_path / "newer", range(3))
    marker = tmp_path / "newer" / "actcache.json"
    marker.write_text(marker.read_text().replace('"format_version": 1', '"format_version": 99'))
    assert "upgrade" in looked(option, tmp_path / "newer", tmp_path).refused(4)
    assert not (tmp_path / "new.html").exists()


@each_detail
def test_an_empty_store_and_an_empty_space(option, tmp_path):
    actcache.open(tmp_path / "store").close()
    code = {"--space": 2, "--segment": 2, "--text": 3, "--key": 3, "--html": 0}[option[0]]
    result = looked(option, tmp_path / "store", tmp_path, "--json")
    assert result.code == code, result.err
    with actcache.open(tmp_path / "store") as opened:
        opened.space(recipe()).close()
    (tmp_path / "new.html").unlink(missing_ok=True)
    result = looked(option, tmp_path / "store", tmp_path, "--json")
    assert result.code == (0 if option[0] == "--space" else code), result.err
    if not result.code:
        (space,) = strict(result)["spaces"]
        assert (space["entries"], space["ratio"], space["bytes_per_token"]) == (0, None, None)
        assert space["lengths"]["histogram"] == {"edges": [], "counts": []}
        assert cachectl("inspect", tmp_path / "store", "--space", NAME).code == 0


@pytest.mark.parametrize("wrong", ["recipe", "newer", "no recipe"])
def test_a_space_that_cannot_be_read_hides_nothing_else(wrong, store, tmp_path):
    folder = make_store(store, range(5), layer=2)
    path = folder / "recipe.json"
    if wrong == "no recipe":
        path.unlink()
    else:
        path.write_text(
            "{" if wrong == "recipe" else path.read_text().replace('"format_version": 1', '"format_version": 7')
        )
    bad = folder.name
    survey = cachectl("inspect", store, "--html", tmp_path / "page.html", "--json")
    assert survey.code == 4
    assert [one["fingerprint"] for one in strict(survey)["spaces"]] == [NAME]
    assert bad in strict(survey)["unreadable"]
    assert bad in (tmp_path / "page.html").read_text()
    assert cachectl("inspect", store, "--space", bad).code == 4
    assert bad in cachectl("inspect", store, "--space", bad).out
    found = cachectl("inspect", store, "--text", "document 3")
    assert found.code == 0
    assert f"unreadable {bad[:12]}" in found.out
    assert f"1 cannot be read ({bad})" in cachectl("inspect", store, "--text", "another").refused(3)
    segment = segment_files(folder)[0].name
    cachectl("inspect", store, "--segment", segment).refused(4)
    tree = cachectl("ls", store, "--tree")
    assert (tree.code, f"space {bad[:12]}  unreadable" in tree.out) == (0, True)


@pytest.mark.parametrize("field", ["hidden_size", "max_length", "layer"])
@pytest.mark.parametrize("value", [2**31, 10**30, 0, -1])
def test_a_recipe_with_impossible_sizes_is_named(field, value, store):
    path = store / "spaces" / NAME / "recipe.json"
    description = json.loads(path.read_text())
    description["identity"] |= {"too_long": "windows", "max_length": 9, field: value}
    path.write_text(json.dumps(description))
    for command in (["inspect"], ["inspect", "--space", NAME], ["ls", "--tree"], ["verify"]):
        result = cachectl(command[0], store, *command[1:], "--json")
        assert "no whole number from 1" in strict(result)["unreadable"][NAME]
    assert "1 cannot be read" in cachectl("inspect", store, "--text", "a").refused(3)


def test_files_from_before_every_calendar(store, tmp_path):
    for path in segment_files(store / "spaces" / NAME):
        os.utime(path, (-(10**10), -(10**10)))
    (path,) = store.glob("spaces/*/recipe.json")
    try:
        os.utime(path, (-(10**12), -(10**12)))
    except OverflowError:
        pytest.skip("this file system keeps no such times")
    assert cachectl("inspect", store, "--space", NAME).code == 0
    assert cachectl("inspect", store, "--html", tmp_path / "page.html").code == 0
    assert moment(-(10**15)).startswith("1")
    assert moment(10**15).startswith("9999-")


def test_an_interrupted_page(store, tmp_path, monkeypatch):
    """Exit code 130, one line, no page; the same command makes it the next time."""
    tell = Meter.__call__

    def interrupted(self, *told):
        tell(self, *told)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Meter, "__call__", interrupted)
        assert "run it again" in cachectl("inspect", store, "--html", tmp_path / "page.html").refused(130)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert cachectl("inspect", store, "--html", tmp_path / "page.html").code == 0


def test_one_thing_at_a_time(store, tmp_path):
    for options in (
        ["--text", "a", "--key", "b"],
        ["--segment", "a", "--html", tmp_path / "x"],
        ["--key", "", "--text", ""],
    ):
        assert "give one of them" in cachectl("inspect", store, *options).refused(2)
    assert not (tmp_path / "x").exists()


def test_looking_changes_nothing(store, tmp_path):
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for option in (["--space", NAME], ["--segment", "000000000001"], ["--text", "document 1"], ["--html", "{new}"]):
        assert looked(option, store, tmp_path).code == 0
    assert cachectl("ls", store, "--tree").code == 0
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_names_are_printed_as_they_are(tmp_path):
    """No markup of ours, no emoji, nothing that a terminal obeys; a name that is no UTF-8 is no failure."""
    name = "[/bold]/[bold] [red]x :smile: \x1b[2J\x07 \udc80 <script>"
    make_store(tmp_path / "store", range(3), model=name)
    for command in (["inspect"], ["ls"], ["ls", "--tree"], ["inspect", "--text", "document 1"]):
        result = cachectl(command[0], tmp_path / "store", *command[1:])
        assert result.code == 0, result.err
        assert "[bold] [red]x :smile: \N{REPLACEMENT CHARACTER}[2J" in result.out
        assert "\x1b" not in result.out
        result.out.encode()


# --- ls --tree --------------------------------------------------------------------------------------------------------


def test_the_tree(store):
    make_store(store, range(5), layer=2)
    with actcache.open(store) as opened:
        opened.put_collection("corpus", [key(n) for n in (0, 1, 7, 50)])
    found = strict(cachectl("ls", store, "--tree", "--json"))
    assert found["collections"] == {"corpus": 4}
    branches = {one["fingerprint"]: one for one in found["spaces"]}
    assert [one["entries"] for one in branches[NAME]["segment_list"]] == [10, 10, 10]
    assert branches[NAME]["collections"] == {"corpus": {"documents": 4, "present": 3}}
    assert branches[recipe(layer=2).fingerprint]["collections"] == {"corpus": {"documents": 4, "present": 2}}
    lines = cachectl("ls", store, "--tree").out.splitlines()
    assert lines[0] == str(store)
    for fact in (f"space {NAME[:12]}  tests layer 1 float32: 30 entries", "collection corpus: 3 of 4 documents"):
        assert len([line for line in lines if fact in line]) == 1
    assert len([line for line in lines if "10 entries" in line]) == 3
    (store / "collections" / "corpus.safetensors").write_bytes(b"x")
    found = strict(cachectl("ls", store, "--tree", "--json"))
    assert isinstance(found["collections"]["corpus"], str)
    assert cachectl("ls", store, "--tree", "--space", NAME[:5]).code == 0
    cachectl("ls", store, "--tree", "--space", "zz").refused(2)
