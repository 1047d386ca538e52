"""The caller's own columns of a space: their schema, declared by whoever puts the first ones, and their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import EXTRAS, OWN, Columns, Snapshot, StoreDriver
from actcache.entries.entry import OwnColumns
from actcache.entries.incoming import Lists
from actcache.entries.read import Request
from actcache.errors import ShapeError, UsageError
from actcache.format.columns import BLOB, Schema, as_arrays
from actcache.store.description import space_blob


class DeclaredColumns:
    """What a space knows of its own columns. Writers take turns; others may read meanwhile.

    Args:
        forms: dtypes and trailing shapes of ragged arrays by name, of all who have to know those of the records once
            there is a schema.
    """

    def __init__(self, driver: StoreDriver, fingerprint: str, forms: Sequence[dict[str, Any]]) -> None:
        self._store, self._blob, self._forms = driver, space_blob(fingerprint, BLOB), forms
        self.schema: Schema | None = None  #: None where no entry has any

    def look(self, snapshot: Snapshot) -> None:
        """Learn of a schema that somebody else has declared by now."""
        if self.schema is None and snapshot.may_have(OWN) and (data := self._store.read_blob(self._blob)) is not None:
            self._use(Schema.loads(data, self._blob))

    def declare(self, schema: Schema) -> Schema:
        """Have the columns be these, durably; return what they are: those of whoever came first."""
        if self.schema is None:
            self._store.write_blob(self._blob, schema.dumps(), replace=False)
            data = self._store.read_blob(self._blob)
            self._use(schema if data is None else Schema.loads(data, self._blob))
        assert self.schema is not None
        return self.schema

    def _use(self, schema: Schema) -> None:
        for forms in self._forms:
            forms[OWN] = ("|u1", (schema.width,))
        self.schema = schema

    def records(self, arrays: Mapping[str, NDArray[Any]], tokens: int) -> NDArray[np.uint8]:
        """Return columns of ``tokens`` rows as records ``[tokens, width]``, declaring them where they are right and
        nobody has."""
        if self.schema is None:
            schema = Schema.of(arrays)
            records = schema.pack(arrays, tokens)
            if self.declare(schema) == schema:
                return records
        assert self.schema is not None
        return self.schema.pack(arrays, tokens)

    def lists(
        self, keys: NDArray[np.uint8], rows: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[NDArray[np.uint8]]:
        """Return the records of each entry; ``rows`` are its activations, as they were given."""
        if not isinstance(columns, Mapping) or not columns:
            raise UsageError(f"columns are a mapping of names to lists of arrays, not {columns!r:.80}")
        lists = Lists(columns).lists
        for name, given in lists.items():
            if len(given) != len(rows):
                raise ShapeError(f"{len(rows)} arrays and {len(given)} of column {name}: give one a key")
        entries = [as_arrays({name: given[i] for name, given in lists.items()}) for i in range(len(rows))]
        tokens = [np.shape(one)[0] if np.ndim(one) else 0 for one in rows]
        names = [f"document {key.tobytes().hex()}" for key in keys]
        schema = self.schema
        if schema is None and entries:
            schema = Schema.of(entries[0])
            for arrays, count, what in zip(entries, tokens, names, strict=False):
                schema.pack(arrays, count, what)
            schema = self.declare(schema)
        return [
            schema.pack(arrays, count, what)  # type: ignore[union-attr]
            for arrays, count, what in zip(entries, tokens, names, strict=False)
        ]

    def read(self, request: Request, stored: Columns) -> tuple[OwnColumns, NDArray[np.int64]]:
        """Return the columns of a request's entries, packed, and the positions of those whose checksum fails."""
        lengths, corrupt = np.zeros(len(request.lengths), np.int64), np.empty(0, np.int64)
        if self.schema is None:
            return OwnColumns(lengths, {}), corrupt
        having = np.flatnonzero(request.has(OWN) & (request.lengths > 0))
        lengths[having] = request.lengths[having]
        some, out = request.part(having), dict[str, NDArray[Any]]()
        for name in (*EXTRAS, OWN):  # one checksum is over all of them
            if some.has(name).any():
                dtype, trailing = stored[name]
                out[name] = np.empty((int(some.lengths.sum()), *trailing), dtype)
        if OWN in out:
            corrupt = having[some.read(out, None, verify=True)]
        records = out.get(OWN, np.empty((0, self.schema.width), np.uint8))
        return OwnColumns(lengths, self.schema.unpack(records)), corrupt
