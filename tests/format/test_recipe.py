"""Recipes: what names a space and what does not, and nothing on disk that could not be read again."""

from __future__ import annotations

import hashlib
import json

import pytest

import actcache
from actcache.errors import FormatError, RecipeError
from actcache.format.recipe import Recipe, is_fingerprint

FULL = {
    "model": "bert-base-uncased",
    "layer": 6,
    "hidden_size": 768,
    "dtype": "float16",
    "weights": "ab" * 16,
    "config": {"layer_norm_eps": 1e-12, "num_attention_heads": 12, "act": "gelu"},
    "compute_dtype": "float32",
    "tokenizer": "cd" * 16,
    "special_tokens": True,
    "max_length": 512,
    "too_long": "truncate",
    "provenance": {"revision": "main", "torch": "2.13.0"},
}


def test_golden_fingerprints():
    """A fingerprint is the name of a folder on somebody's disk: it must not change."""
    text = (
        '{"compute_dtype":"float32","config":{"act":"gelu","layer_norm_eps":1e-12,"num_attention_heads":12},'
        '"dtype":"float16","hidden_size":768,"layer":6,"max_length":512,"special_tokens":true,'
        f'"tokenizer":"{"cd" * 16}","too_long":"truncate","weights":"{"ab" * 16}"}}'
    )
    digest = hashlib.blake2b(text.encode(), digest_size=16, person=b"actcache/recipe").hexdigest()
    assert Recipe(**FULL).fingerprint == digest == "d00fc3c79685b18358e2ddb90befcdd1"
    assert Recipe(model="m", layer=1, hidden_size=8).fingerprint == "09b039ea40088ad3a804945ecabbedb6"
    assert is_fingerprint(digest)
    assert not is_fingerprint(digest.upper())
    assert not is_fingerprint(digest + "0")
    assert not is_fingerprint(digest + "\n")


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 5},
        {"hidden_size": 384},
        {"dtype": "bfloat16"},
        {"weights": "ac" * 16},
        {"weights": None},
        {"config": {**FULL["config"], "layer_norm_eps": 1e-5}},
        {"config": {**FULL["config"], "new": None}},
        {"config": {}},
        {"compute_dtype": "bfloat16"},
        {"tokenizer": None},
        {"tokenizer": "ce" * 16},
        {"special_tokens": False},
        {"max_length": 511},
        {"max_length": None},
        {"too_long": "windows"},
        {"via": ("bfloat16",)},
    ],
    ids=str,
)
def test_identity(change):
    one, other = Recipe(**FULL), Recipe(**{**FULL, **change})
    assert one.fingerprint != other.fingerprint
    assert one != other
    assert one.differences(other)
    assert {name.partition(".")[0] for name in one.differences(other)} == set(change)


def test_differences_name_the_config_value():
    other = Recipe(**{**FULL, "config": {**FULL["config"], "layer_norm_eps": 1e-5}, "layer": 2})
    assert Recipe(**FULL).differences(other) == {"config.layer_norm_eps": (1e-12, 1e-5), "layer": (6, 2)}
    assert Recipe(**FULL).differences(Recipe(**FULL)) == {}


@pytest.mark.parametrize(
    "change", [{"model": "somebody/bert-finetuned"}, {"provenance": {}}, {"provenance": {"torch": "3.0"}}], ids=str
)
def test_provenance_is_not_identity(change):
    one, other = Recipe(**FULL), Recipe(**{**FULL, **change})
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1


def test_the_model_names_a_recipe_only_without_weights():
    bare = {"layer": 1, "hidden_size": 8}
    assert Recipe(model="a", **bare) != Recipe(model="b", **bare)
    assert Recipe(model="a", weights="w", **bare) == Recipe(model="b", weights="w", **bare)
    assert Recipe(model="a", **bare) != Recipe(model="b", weights="a", **bare)


def test_config_order_and_containers_do_not_matter():
    first = Recipe(**{**FULL, "config": {"a": 1, "b": [1, 2], "c": {"x": 1, "y": 2}}})
    second = Recipe(**{**FULL, "config": {"c": {"y": 2, "x": 1}, "b": (1, 2), "a": 1}})
    assert first == second


def test_a_recipe_does_not_change_with_its_callers_dictionaries():
    config, provenance = {"eps": [1]}, {"a": "b"}
    recipe = Recipe(model="m", layer=1, hidden_size=8, config=config, provenance=provenance)
    before = recipe.fingerprint
    config["eps"].append(2)
    config["more"] = 1
    provenance["a"] = "c"
    assert recipe.fingerprint == before
    assert recipe.provenance == {"a": "b"}


def test_json_round_trip():
    elsewhere = {**FULL, "layer": None, "site": "layers.5.mlp:input"}
    for fields in (
        FULL,
        elsewhere,
        {"model": "m", "layer": 1, "hidden_size": 8},
        {**FULL, "weights": None, "max_length": None},
    ):
        recipe = Recipe(**fields)
        again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
        assert again == recipe
        assert again.model == recipe.model
        assert again.identity() == recipe.identity()
        assert {**again.provenance, "model": ""} == {**recipe.provenance, "model": ""}


def test_other_sites_are_other_spaces() -> None:
    sites = [{"layer": 0}, {"layer": 5}, {"site": "layers.5"}, {"site": "layers.5:input"}, {"site": "last"}]
    recipes = [Recipe(**{**FULL, "layer": None, **one}) for one in (*sites, {"layer": 6})]
    assert len({one.fingerprint for one in recipes}) == len(recipes)
    assert "site" not in recipes[0].identity()
    assert "layer" not in recipes[2].identity()
    assert [one.site_name for one in recipes[1:4]] == ["layer 5", "layers.5", "layers.5:input"]
    assert recipes[1].differences(recipes[2]) == {"layer": (5, None), "site": (None, "layers.5")}


@pytest.mark.parametrize(
    "bad",
    [
        {"model": ""},
        {"model": None},
        {"layer": None},
        {"layer": -1},
        {"site": "norm"},  # and a layer
        {"layer": None, "site": ""},
        {"layer": None, "site": "a b"},
        {"layer": None, "site": "layers..mlp"},
        {"layer": None, "site": "layers.5.mlp:output"},  # which is layers.5.mlp
        {"layer": None, "site": 5},
        {"layer": True},
        {"layer": 1.0},
        {"layer": "1"},
        {"hidden_size": 0},
        {"hidden_size": None},
        {"dtype": "int3"},
        {"dtype": None},
        {"dtype": ["float16"]},
        {"compute_dtype": "float8"},
        {"max_length": 0},
        {"max_length": "512"},
        {"too_long": "drop"},
        {"weights": {"model": "bert-base-uncased"}},  # would be the same as a recipe without weights
        {"weights": ""},
        {"weights": 5},
        {"tokenizer": 5},
        {"special_tokens": 1},
        {"special_tokens": None},
        {"config": {"eps": float("nan")}},
        {"config": {"eps": float("inf")}},
        {"config": {"eps": object()}},
        {"config": {"eps": b"bytes"}},
        {"config": {"eps": {1, 2}}},
        {"config": {(1, 2): 3}},
        {"config": {1: 2, "a": 3}},
        {"config": [1, 2]},
        {"config": None},
        {"provenance": {"n": 5}},  # would be written and could not be read again
        {"provenance": {5: "n"}},
        {"provenance": None},
        {"provenance": "text"},
    ],
)
def test_bad_fields(bad):
    with pytest.raises(RecipeError):
        Recipe(**{**FULL, **bad})


def broken(**changes):
    value = json.loads(json.dumps(Recipe(**FULL).to_json()))
    for path, new in changes.items():
        section, _, name = path.partition("__")
        if name:
            value[section][name] = new
        else:
            value[section] = new
    return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        "text",
        [],
        {},
        {"identity": {}},
        {"identity": {}, "provenance": {}},
        broken(identity=None),
        broken(identity="abc"),
        broken(identity=[1]),
        broken(provenance=None),
        broken(provenance={}),
        broken(provenance__model=5),
        broken(provenance__torch=2.0),
        broken(identity__unknown=1),
        broken(identity__layer="6"),
        broken(identity__layer=-1),
        broken(identity__layer=None),
        broken(identity__site="norm"),
        broken(identity__layer=None, identity__site="a:b"),
        broken(identity__config=5),
        broken(identity__config=None),
        broken(identity__dtype="int3"),
        broken(identity__weights=[]),
        broken(identity__special_tokens="yes"),
        broken(identity__model="m"),
        {key: value for key, value in broken().items() if key != "provenance"},
    ],
    ids=lambda value: str(value)[:40],
)
def test_garbage_is_no_recipe(value):
    with pytest.raises(FormatError):
        Recipe.from_json(value)


def test_a_recipe_that_is_refused_leaves_nothing_behind(tmp_path):
    with actcache.open(tmp_path / "store") as store:
        with pytest.raises(RecipeError):
            store.space(Recipe(**{**FULL, "provenance": {"n": 5}}))
        assert store.recipes() == []
