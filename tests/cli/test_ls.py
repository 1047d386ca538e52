"""``cachectl ls``: rows that read the same say what differs, and pins show."""

from __future__ import annotations

import actcache
from actcache.admin.display import model_name
from actcache.cli.common import SHORT
from tests.cli.running import cachectl
from tests.support import key, recipe, rows


def test_what_tells_spaces_apart_and_what_is_pinned(tmp_path):
    given = [recipe(layer=3, max_length=128), recipe(layer=3, max_length=256), recipe(layer=4)]
    with actcache.open(tmp_path / "s") as opened:
        for one in given:
            with opened.space(one) as space:
                space.put([key(1)], [rows(1)])
    short = [one.fingerprint[:SHORT] for one in given]
    said = cachectl("ls", tmp_path / "s").out.splitlines()
    apart = {line.split(":")[0]: line for line in said if ":" in line and line.split(":")[0] in short}
    assert apart.keys() == set(short[:2])
    assert apart[short[0]].endswith(": max_length 128")
    assert apart[short[1]].endswith(": max_length 256")
    assert not any("pinned" in line for line in said)
    assert cachectl("pin", tmp_path / "s", given[1].fingerprint).code == 0
    found = cachectl("ls", tmp_path / "s", "--json").json()
    assert {one["space"]: one["pinned"] for one in found["spaces"]} == {
        one.fingerprint: one is given[1] for one in given
    }
    assert f"pinned {short[1]}" in cachectl("ls", tmp_path / "s").out.splitlines()


def test_folders_whose_names_say_nothing():
    names = {
        "bert-base-uncased": "bert-base-uncased",
        "org/minilm": "minilm",
        "/data/minilm": "minilm",
        "/data/minilm/model": "minilm/model",
        "/runs/a/checkpoint-500": "a/checkpoint-500",
        "/hub/models--org--minilm/snapshots/0a1b2c": "minilm",
    }
    assert {name: model_name(recipe(model=name)) for name in names} == names
