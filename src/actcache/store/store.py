"""A store: a root that holds spaces and collections."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import errors
from actcache.backend import StoreDriver
from actcache.entries.writer import SEGMENT_BYTES, SEGMENT_SECONDS
from actcache.format.arguments import dtype_name, whole
from actcache.format.recipe import Recipe, is_fingerprint
from actcache.io.notebook import table
from actcache.segments import registry
from actcache.store.collection import Collection
from actcache.store.description import read_recipe, write_recipe
from actcache.store.space import Space

SWEEP_SECONDS = 86_400.0

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_LONGEST_NAME = 240  # a file's name has at most 255 bytes, its suffix among them
_SUFFIX = ".safetensors"
_NEAREST = 3


def open_store(url: str | Path, mode: str = "a", **options: Any) -> Store:
    """Open the store at a path or URL.

    Args:
        url: a path, or ``scheme:place`` with the scheme of a backend (``hdf5:./activations``). A path where a store
            stands opens whatever backend made it; where none stands, the default backend makes one.
        mode: ``"a"`` to read and write, creating the store where it is absent; ``"r"`` to read.
        options: the backend's own.

    Raises:
        BackendError, MissingExtraError: the scheme is not known, or its library is not installed.
        StoreNotFoundError, NotAStoreError, FormatVersionError, ReadOnlyError: what lies there cannot be opened.
    """
    return Store(url, mode, options)


def open_standing(url: str | Path, **options: Any) -> Store:
    """Open a store as ``open_store`` does, but make none where none stands: ``StoreNotFoundError``."""
    return Store(url, "a", options, create=False)


def _opened_elsewhere(url: str | Path, mode: str, options: dict[str, Any], identity: bytes) -> Store:
    """Open a store that was pickled: that one, and no other that lies there now."""
    try:
        store = Store(url, mode, options, create=False)
    except (errors.StoreNotFoundError, errors.NotAStoreError) as error:
        raise errors.StoreGoneError(
            f"{error}; the store that was sent here was moved, removed, or is not seen here"
        ) from None
    if store.driver.identity != identity:
        store.close()
        raise errors.StoreGoneError(
            f"another store lies at {url} than the one that was sent here: open the one that is meant"
        )
    return store


class Store:
    """Made by ``actcache.open``. Thread-safe; pickles as its URL, made absolute.

    A store stays the one that was opened. Once its folder was moved or removed, or another store was made in its place,
    whatever would change or list something raises ``StoreGoneError``; reads serve what it held, or raise that as well.
    """

    def __init__(self, url: str | Path, mode: str, options: dict[str, Any], *, create: bool = True) -> None:
        self.url = str(url)
        self.writable = mode == "a"
        resolved = registry.resolve(url)
        self._driver: StoreDriver | None = registry.open_driver(resolved, mode, options, create=create)
        self._reopen = (resolved, mode, options, self._driver.identity)
        self._spaces: list[Space] = []

    @property
    def driver(self) -> StoreDriver:
        """The backend's side of the store."""
        if self._driver is None:
            raise errors.ClosedError(f"the store {self.url} is closed; open it again with actcache.open")
        return self._driver

    @property
    def address(self) -> str:
        """The URL, made absolute: it opens this store from every working directory, and in other processes."""
        return str(self._reopen[0])

    # --- spaces ------------------------------------------------------------------------------------------------------

    def space(
        self,
        recipe: Recipe,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        segment_seconds: float = SEGMENT_SECONDS,
        late: bool = False,
    ) -> Space:
        """Open the space of a recipe, creating it where it is absent.

        Args:
            segment_bytes, segment_seconds: a writer publishes what it holds when it is so large, or so old, whether
                more is put or not. A process that is killed loses what is younger, and what is being published then.
            late: whether a space that is absent comes to be with the first thing that is stored in it, and not now.

        Raises:
            SpaceNotFoundError: it is absent and the store is read-only; the message lists the nearest ones.
            FormatError, FormatVersionError: the space's own description is damaged or newer than this release.
            UsageError: ``segment_bytes`` is no whole number of 1 or more.
        """
        segment_bytes = whole("segment_bytes", segment_bytes, 1)
        fingerprint = recipe.fingerprint
        stored = self.recipe(fingerprint)
        created = False
        if stored is None:
            if not self.writable:
                raise errors.SpaceNotFoundError(self._explain(recipe))
            created = late or write_recipe(self.driver, recipe)
            stored = recipe if late else self.recipe(fingerprint) or recipe
        space = Space(
            self.driver,
            stored,
            created=created,
            stands=not (created and late),
            writable=self.writable,
            segment_bytes=segment_bytes,
            segment_seconds=segment_seconds,
            reopen=self.space,
            on_close=self._forget,
        )
        self._spaces.append(space)
        return space

    def spaces(self, **fields: Any) -> list[Space]:
        """Open the spaces of recipes that have these fields (``model="bert-base-uncased", layer=6``), all without any,
        in the order of their fingerprints. Raises as ``recipe``; ``UsageError`` for what is no field of a recipe."""
        known = {field.name for field in dataclasses.fields(Recipe)}
        if unknown := fields.keys() - known:
            names = ", ".join(sorted(unknown))
            raise errors.UsageError(f"recipes have no field {names}; they have {', '.join(sorted(known))}")
        fields = {name: dtype_name(value) if "dtype" in name else value for name, value in fields.items()}
        return [
            self.space(recipe)
            for recipe in self.recipes()
            if all(getattr(recipe, name) == value for name, value in fields.items())
        ]

    def __getitem__(self, prefix: str) -> Space:
        """Open the space whose fingerprint begins so.

        Raises:
            SpaceNotFoundError: there is none, or its description is gone.
            UsageError: several begin so, or it is no text.
        """
        if not isinstance(prefix, str) or not prefix:
            raise errors.UsageError(
                f"store[...] takes the beginning of a fingerprint, such as '6241', not {prefix!r:.40}"
            )
        names = self.fingerprints()
        found = [name for name in names if name.startswith(prefix.lower())]
        if len(found) > 1:
            raise errors.UsageError(f"{prefix!r} begins {len(found)} spaces' fingerprints: {', '.join(found)}")
        recipe = self.recipe(found[0]) if found else None
        if recipe is None:
            raise errors.SpaceNotFoundError(f"{self.url} has no space {prefix!r}; it has {', '.join(names) or 'none'}")
        return self.space(recipe)

    def __iter__(self) -> Iterator[Space]:
        """Open one space after another, in the order of their fingerprints."""
        return (self.space(recipe) for recipe in self.recipes())

    def __len__(self) -> int:
        """Return how many spaces there are."""
        return len(self.fingerprints())

    def __bool__(self) -> bool:
        return True  # a store without spaces is one

    def fingerprints(self) -> list[str]:
        """Return the names of all spaces, sorted; of those whose description cannot be read, too."""
        return self.driver.spaces()

    def recipes(self) -> list[Recipe]:
        """Return the recipes of all spaces, in the order of their fingerprints. Raises as ``recipe``."""
        found = (self.recipe(fingerprint) for fingerprint in self.driver.spaces())
        return [recipe for recipe in found if recipe is not None]

    def nearest(self, recipe: Recipe) -> list[tuple[Recipe, dict[str, tuple[Any, Any]]]]:
        """Return the other recipes of the store, those with the fewest differences first, each with its differences
        as ``field -> (the given recipe's, the other's)``. Spaces whose description cannot be read are left out."""
        readable = []
        for fingerprint in self.fingerprints():
            with suppress(errors.FormatError):
                readable.append(self.recipe(fingerprint))
        others = [(other, recipe.differences(other)) for other in readable if other is not None and other != recipe]
        return sorted(others, key=lambda pair: len(pair[1]))

    def recipe(self, fingerprint: str) -> Recipe | None:
        """Return the recipe of a space, None where it has none: it is being made, or was deleted.

        Raises:
            FormatError, FormatVersionError: its description is damaged or newer than this release.
        """
        return read_recipe(self.driver, fingerprint, self.url)

    def delete_space(self, fingerprint: str) -> bool:
        """Delete a space with all its entries, durably; return whether it was there.

        Whoever reads it finds its entries absent; what a writer flushes afterwards is a new space's.
        """
        self.check_writable()
        if not is_fingerprint(fingerprint):
            raise errors.UsageError(f"{fingerprint!r} is no fingerprint of a space: see store.fingerprints()")
        return self.driver.delete_space(fingerprint)

    def _explain(self, recipe: Recipe) -> str:
        lines = [f"{self.url} has no space for {recipe.model} {recipe.site_name} as {recipe.stored_as}"]
        for other, differences in self.nearest(recipe)[:_NEAREST]:
            fields = "; ".join(f"{name}: {mine} here, {theirs} there" for name, (mine, theirs) in differences.items())
            lines.append(f"{other.fingerprint} ({other.model} {other.site_name}) differs in {fields}")
        return "; nearest: ".join([lines[0], " | ".join(lines[1:])]) if lines[1:] else f"{lines[0]}, nor any other"

    # --- collections -------------------------------------------------------------------------------------------------

    def put_collection(
        self,
        name: str,
        keys: Sequence[bytes] | NDArray[np.uint8],
        ids: Sequence[str] | None = None,
        *,
        documents: Any = None,
        own: Any = None,
    ) -> None:
        """Store a named, ordered list of keys, durably; one of that name is replaced.

        ``documents`` and ``own`` say of keys of passages which document each is of, and which tokens are its own: see
        ``Collection``, and ``Recycler.outline``.

        Raises:
            UsageError: the name has other characters than letters, digits, ``.``, ``_`` and ``-``, begins with a dot,
                or is longer than 240 characters.
            KeyFormatError, ShapeError: see ``Collection.of``.
        """
        self.check_writable()
        self.driver.write_blob(
            self.collection_blob(name), Collection.of(keys, ids, documents, own).to_bytes(), replace=True
        )

    def collection(self, name: str) -> Collection:
        """Return a collection; ``CollectionNotFoundError`` where there is none of that name, ``FormatError`` where its
        file is damaged."""
        data = self.driver.read_blob(self.collection_blob(name))
        if data is None:
            known = ", ".join(self.collections()) or "none"
            raise errors.CollectionNotFoundError(f"{self.url} has no collection {name!r}; it has {known}")
        return Collection.from_bytes(data, f"{self.url}: collection {name!r}")

    def collections(self) -> list[str]:
        """Return the names of all collections, sorted."""
        names = (blob.rpartition("/")[2] for blob in self.driver.blobs("collections"))
        return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]

    @staticmethod
    def collection_blob(name: str) -> str:
        """Return the name of a collection's blob; ``UsageError`` as of ``put_collection``."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise errors.UsageError(f"{name!r:.80} is no name for a collection: use letters, digits, '.', '_' and '-'")
        if len(name) > _LONGEST_NAME:
            count = f"{name:.40}... has {len(name)} characters"
            raise errors.UsageError(f"{count}; a collection's name has at most {_LONGEST_NAME}")
        return f"collections/{name}{_SUFFIX}"

    def delete_collection(self, name: str) -> bool:
        """Delete a collection, not its entries; return whether it was there."""
        self.check_writable()
        return self.driver.delete_blob(self.collection_blob(name))

    def sweep(self, older_than: float = SWEEP_SECONDS) -> int:
        """Remove what killed writers left behind (temporary files, unfinished uploads); return how many things.

        Args:
            older_than: seconds without a change; less than a live writer takes for one segment endangers its work.
        """
        self.check_writable()
        return self.driver.sweep(older_than)

    # --- closing -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Flush and close all spaces that were opened through this object. Does nothing the second time."""
        if self._driver is None:
            return
        with ExitStack() as stack:  # all of it, also where one of them fails
            stack.callback(setattr, self, "_driver", None)
            stack.callback(self._driver.close)
            for space in list(self._spaces):
                stack.callback(space.close)

    def _forget(self, space: Space) -> None:
        if space in self._spaces:
            self._spaces.remove(space)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_elsewhere, self._reopen

    def __repr__(self) -> str:
        return f"<Store {self.url}>" if self._driver is not None else f"<Store {self.url}, closed>"

    def _repr_html_(self) -> str:
        if self._driver is None:
            return table(f"Store {self.url} (closed)", [])
        rows: list[tuple[str, object]] = []
        for fingerprint in self.fingerprints():
            try:
                recipe = self.recipe(fingerprint)
                about = f"{recipe.model}, {recipe.site_name}, {recipe.stored_as}" if recipe else "being made"
            except errors.ActcacheError as error:
                about = str(error)
            rows.append((fingerprint, about))
        return table(f"Store {self.url}", [*rows, ("collections", self.collections())])

    def check_writable(self) -> None:
        """Raise ``ReadOnlyError`` where the store was opened with mode='r'."""
        if not self.writable:
            raise errors.ReadOnlyError(f"{self.url} was opened with mode='r'; open it with mode='a' to write")
