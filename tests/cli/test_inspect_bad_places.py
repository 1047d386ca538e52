"""``cachectl inspect`` in detail where something is wrong: one line or a row that names it, and nothing changed."""

from __future__ import annotations

import json
import os
import signal

import pytest

import actcache
from actcache.admin.display import moment
from actcache.io.progress import Meter
from tests.cli.inspected import NAME, filled, strict
from tests.cli.running import cachectl
from tests.support import make_store, recipe, segment_files


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path / "store")


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
    assert [one["space"] for one in strict(survey)["spaces"]] == [NAME]
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


SIZES = [(field, value) for field in ("hidden_size", "max_length", "layer") for value in (2**31, 10**30, 0, -1)]


@pytest.mark.parametrize(("field", "value"), [size for size in SIZES if size != ("layer", 0)])  # which there is
def test_a_recipe_with_impossible_sizes_is_named(field, value, store):
    path = store / "spaces" / NAME / "recipe.json"
    description = json.loads(path.read_text())
    description["identity"] |= {"too_long": "windows", "max_length": 9, field: value}
    path.write_text(json.dumps(description))
    for command in (["inspect"], ["inspect", "--space", NAME], ["ls", "--tree"], ["verify"]):
        result = cachectl(command[0], store, *command[1:], "--json")
        assert f"no whole number from {0 if field == 'layer' else 1}" in strict(result)["unreadable"][NAME]
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
    assert "give one of them" in cachectl("inspect", store, "--all", "--sample", 3).refused(2)
    assert strict(cachectl("inspect", store, "--sample", 3, "--json"))["spaces"][0]["sample"]["entries"] == 3
    assert "read 30 of 30 entries: intact" in cachectl("inspect", store, "--all").out


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
