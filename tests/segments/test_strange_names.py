"""Folders and collections of any name: everything works there, or one error says why not."""

from __future__ import annotations

import pickle

import pytest

import actcache
from actcache.errors import ActcacheError, UsageError
from tests.support import check, compact, key, put, recipe
from tests.support.backends import each

STRANGE = "new\nline\ttab\r\x1b\x7f\u2028 %20 100% #?*[a]{b}\\c'\"|<>^`~&;=+@$:é日😀 -"


def round_trip(url, **options):
    """Put, flush, list, open again, get, delete, compact, sweep."""
    with actcache.open(url, **options) as store, store.space(recipe()) as space:
        put(space, range(6))
        space.flush()
        store.put_collection("some", [key(1)])
        assert space.delete([key(0)]) == 1
    with actcache.open(url, **options) as store, store.space(recipe()) as space:
        check(space, dict.fromkeys(range(1, 6), 0), range(8))
        put(space, [7])
        space.flush()
        compact(space)
        again = pickle.loads(pickle.dumps(space))  # noqa: S301
        check(again, {**dict.fromkeys(range(1, 6), 0), 7: 0}, range(9))
        again.close()
        assert store.collections() == ["some"]
        assert store.fingerprints() == [recipe().fingerprint]
        assert f"spaces/{recipe().fingerprint}/recipe.json" in store.driver.listing()
        store.sweep(0.0)
        assert store.delete_space(recipe().fingerprint)
        assert store.fingerprints() == []


@each()
@pytest.mark.parametrize("name", [STRANGE, "a//b/./c/", "..hidden", " ", "%2e%2e", "x" * 255, "\udcff"], ids=ascii)
def test_a_folder_of_any_name(kind, tmp_path, name):
    round_trip(kind.url(f"{tmp_path}/{name}"))


@each()
@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "file/x"], ids=["long", "nul", "file"])
def test_a_folder_that_cannot_be(kind, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ActcacheError):
        actcache.open(kind.url(f"{tmp_path}/{name}"))


@each()
def test_names_of_collections(kind, tmp_path):
    with actcache.open(kind.url(tmp_path)) as store:
        good = ["a", "A.b-c_9", "-x", "x.safetensors", "_", "1", "a" * 240]
        for name in good:
            store.put_collection(name, [key(1)])
            assert store.collection(name).keys.tobytes() == key(1)
        assert store.collections() == sorted(good)
        for name in good:
            assert store.delete_collection(name)
        bad = ("", ".", "..", ".x", "a/b", "a b", "a\t", "a\n", "é", "a\0", "a" * 241, None, 5, b"a", tmp_path)
        for name in bad:
            for use in (lambda n: store.put_collection(n, [key(1)]), store.collection, store.delete_collection):
                with pytest.raises(UsageError, match="collection"):
                    use(name)
        assert store.collections() == []
