"""Migrating a store: its spaces one after another, their blobs, and its collections."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from actcache import registry
from actcache.collection import Collection
from actcache.errors import DataError, UsageError
from actcache.inspection import Progress, chosen, opened
from actcache.migration.copying import Copy
from actcache.migration.results import Migration
from actcache.recipe import Recipe
from actcache.space import Space
from actcache.store import Store
from actcache.writer import SEGMENT_BYTES

_NOT_COPIED = {"recipe.json", "used.json", "pinned.json"}  # the target's space has its own


def migrate(
    source: Store,
    target: Store,
    *,
    prefixes: Sequence[str] = (),
    dtype: str | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    progress: Progress | None = None,
) -> Migration:
    """Copy spaces, with their blobs, and collections into another store; run it again where it was interrupted.

    Memory: two segments, some tens of MiB for rows, and about 200 bytes an entry.

    Args:
        source: opened with ``mode="r"``, better, though nothing is written to it either way.
        prefixes: of the fingerprints of the spaces; all where there are none.
        dtype: how the target stores rows; None keeps each space's own. Another dtype is another recipe, and not always
            that of rows which were computed for it: see ``Recipe.stored_again``.
        segment_bytes: of the target, see ``Store.space``.
        progress: told what is being done, and entries.

    Raises:
        UsageError: a prefix fits no space, or two spaces would become one (see ``meetings``): nothing was copied; a row
            is too large for the dtype: what was copied before stays.
        StoreError: disk full, network, ...: likewise.
    """
    for meeting in meetings(source, target.url, prefixes=prefixes, dtype=dtype):
        raise UsageError(f"{meeting}: name one of them in prefixes, and give the other another target")
    spaces, unreadable = [], {}
    for fingerprint in chosen(source, prefixes):
        try:
            with opened(source, fingerprint) as space:
                recipe = _again(space.recipe, dtype)
                with target.space(recipe, segment_bytes=segment_bytes) as other:
                    _copy_blobs(source, space, other)
                    spaces.append(Copy(space, other, segment_bytes, progress).run())
        except DataError as error:
            unreadable[fingerprint] = str(error)
    collections = {name: _copy_collection(source, target, name) for name in source.collections()}
    return Migration(spaces, unreadable, collections)


def meetings(source: Store, target: str | Path, *, prefixes: Sequence[str] = (), dtype: str | None = None) -> list[str]:
    """Say which spaces would become one space of the target, a sentence for each; none where each gets its own.

    Their entries may be of other numbers, by the digits that one of them has lost, or by the batches that they were
    computed in. Which of the two stands in the target would depend on the order, and nothing would be equal to both.
    A space that stays where it is, because the store is its own target, meets nobody: it is what others become.

    Args:
        target: path or URL of a store, made or not; it is not opened.

    Raises:
        UsageError: a prefix fits no space, or there is no such dtype.
    """
    in_place = _location(source.url) == _location(target)
    met: dict[Recipe, list[Recipe]] = {}
    for fingerprint in chosen(source, prefixes):
        with suppress(DataError):  # migrate leaves it out, and says so
            recipe = source.recipe(fingerprint)
            if recipe is not None and not (in_place and recipe == _again(recipe, dtype)):
                met.setdefault(_again(recipe, dtype), []).append(recipe)
    return [
        f"{' and '.join(_named(one) for one in recipes)} of {source.url} would become one space, {_named(become)}"
        for become, recipes in met.items()
        if len(recipes) > 1
    ]


def _named(recipe: Recipe) -> str:
    return f"{recipe.fingerprint[:12]} ({recipe.stored_as})"


def _location(url: str | Path) -> str:
    return registry.parse(str(registry.resolve(url)))[1]


def _again(recipe: Recipe, dtype: str | None) -> Recipe:
    return recipe if dtype is None else recipe.stored_again(dtype)


def _copy_blobs(store: Store, source: Space, target: Space) -> None:
    for path in store.driver.blobs(f"spaces/{source.recipe.fingerprint}"):
        name = path.rpartition("/")[2]
        data = source.blob(name) if name not in _NOT_COPIED else None
        if data is not None:
            target.put_blob(name, data)


def _copy_collection(source: Store, target: Store, name: str) -> str:
    path = source.collection_blob(name)
    try:
        data = source.driver.read_blob(path)
        if data is None:
            return "deleted meanwhile"
        Collection.from_bytes(data, f"{source.url}: collection {name!r}")
        if target.driver.write_blob(path, data, replace=False):
            return "copied"
        return "present" if target.driver.read_blob(path) == data else "the target has another of that name: delete one"
    except DataError as error:
        return str(error)
