"""Reading a space in parts, each of which becomes a segment of another space."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import checksum, codec
from actcache.backend import EXTRAS, TOKEN_IDS, VALUES, Block
from actcache.errors import CorruptEntryError, DataError
from actcache.key import key_list
from actcache.ragged import offsets_of
from actcache.recipe import Recipe
from actcache.space import Space

_PIECE_BYTES = 32 << 20  # of rows that are read by one call
_COLUMNS = (TOKEN_IDS, *sorted(EXTRAS))

#: Keys, ``[n, 32]``, and the names of the optional arrays that all their entries have.
Planned = tuple[NDArray[np.uint8], tuple[str, ...]]


@dataclass(frozen=True)
class Part:
    """Some entries as the target stores them, all with the same optional arrays."""

    keys: NDArray[np.uint8]  # [n, 32]
    lengths: NDArray[np.int64]  # [n]
    columns: dict[str, NDArray[Any]]
    demanded: NDArray[np.uint64]  # [n, 3] what the target should say of each entry, as ``stored_checksums`` puts it
    corrupt: list[bytes]  # keys that are left out
    nbytes: int  # of rows that were read

    def only(self, which: NDArray[np.bool_]) -> Part:
        """Return a part without the other entries; itself where there are none."""
        if which.all():
            return self
        rows = np.repeat(which, self.lengths)
        columns = {name: column[rows] for name, column in self.columns.items()}
        return replace(
            self, keys=self.keys[which], lengths=self.lengths[which], columns=columns, demanded=self.demanded[which]
        )

    def block(self) -> Block:
        """Return what is published."""
        more = np.ascontiguousarray(self.demanded[:, 2]) if self.columns.keys() & EXTRAS.keys() else None
        sums = np.ascontiguousarray(self.demanded[:, 1])
        return Block(self.keys, offsets_of(self.lengths), sums, self.columns, more)


class Parts:
    """Reads entries of ``source`` as a space of ``recipe`` stores them. Thread-safe."""

    def __init__(self, source: Space, recipe: Recipe, segment_bytes: int) -> None:
        self.same = source.recipe.fingerprint == recipe.fingerprint  #: whether entries have the same checksums
        self._source = source
        self._segment_bytes = segment_bytes
        self._from, self._to = codec.get(source.recipe.dtype), codec.get(recipe.dtype)
        self._seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)

    def plan(self, keys: NDArray[np.uint8]) -> list[Planned]:
        """Return the entries as they lie, cut into segments, each with the names of the optional arrays they have."""
        keys = self._source.in_order(keys)
        has = [self._source.has(name, keys) for name in _COLUMNS]
        kind = np.array([there.astype(np.int64) << i for i, there in enumerate(has)]).sum(axis=0)
        parts = []
        for one in np.unique(kind).tolist():
            names = tuple(name for i, name in enumerate(_COLUMNS) if one >> i & 1)
            parts += [(some, names) for some in self._cut(keys[kind == one], self._to, self._segment_bytes)]
        return parts

    def _cut(self, keys: NDArray[np.uint8], stored: codec.Codec, nbytes: int) -> list[NDArray[np.uint8]]:
        """Return runs of entries, each of about so many bytes of rows, or of one entry."""
        starts = offsets_of(self._source.lengths(keys) * (stored.stored.itemsize * self._source.recipe.hidden_size))
        cuts = np.searchsorted(starts, np.arange(0, int(starts[-1]), nbytes))
        edges = np.unique(np.r_[cuts, len(keys)]).tolist()
        return [keys[first:last] for first, last in itertools.pairwise(edges)]

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, keys: NDArray[np.uint8], names: tuple[str, ...]) -> Part:
        """Read and verify entries; corrupt ones, and those that were deleted meanwhile, are left out."""
        total, hidden = int(self._source.lengths(keys).sum()), self._source.recipe.hidden_size
        columns = {name: np.empty((total, *EXTRAS[name][1]), EXTRAS[name][0]) for name in names if name in EXTRAS}
        columns[VALUES] = np.empty((total, hidden), self._to.stored)
        if TOKEN_IDS in names:
            columns[TOKEN_IDS] = np.empty(total, np.int32)
        read = self._rows if set(names) <= {TOKEN_IDS} else self._entries
        kept, lengths, corrupt, end = [keys[:0]], [np.empty(0, np.int64)], [], 0
        for some in self._cut(keys, self._from, _PIECE_BYTES):
            while True:
                some = some[self._source.contains(some)]
                if end + int(self._source.lengths(some).sum()) > total:
                    raise DataError("entries of the source were replaced while they were read: run it again")
                try:
                    found = read(some, {name: column[end:] for name, column in columns.items()})
                    break
                except CorruptEntryError as error:
                    corrupt += error.keys
                    bad = set(error.keys)
                    some = some[[key not in bad for key in key_list(some)]]
            kept.append(some[found > 0])
            lengths.append(found[found > 0])
            end += int(found.sum())
        columns = {name: column[:end] for name, column in columns.items()}
        return self._part(np.concatenate(kept), np.concatenate(lengths), columns, corrupt)

    def _rows(self, keys: NDArray[np.uint8], out: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Read entries in one go into the beginning of buffers; return their lengths."""
        ids = out.get(TOKEN_IDS)
        if self._from.name == self._to.name:
            return self._source.read_into(keys, out[VALUES], token_ids=ids).lengths
        total = int(self._source.lengths(keys).sum())
        values = np.empty((total, self._source.recipe.hidden_size), self._from.stored)
        lengths = self._source.read_into(keys, values, token_ids=None if ids is None else ids[:total]).lengths
        self._encode(keys, lengths, self._from.decode(values), out[VALUES])
        return lengths

    def _entries(self, keys: NDArray[np.uint8], out: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
        """The same for entries that have spans, word or type ids."""
        entries = self._source.get(keys)
        lengths = np.array([0 if entry is None else len(entry.activations) for entry in entries], np.int64)
        for entry, begin in zip(entries, offsets_of(lengths).tolist(), strict=False):
            if entry is None:
                continue
            for name, column in out.items():
                if name != VALUES:
                    rows = entry.token_ids if name == TOKEN_IDS else entry.extras.get(name)
                    if rows is None:
                        raise DataError(f"an entry lost its {name} while it was read: run it again")
                    column[begin : begin + len(rows)] = rows
        there = [entry.activations for entry in entries if entry is not None]
        if there:
            self._encode(keys, lengths, np.concatenate(there), out[VALUES])
        return lengths

    def _encode(
        self, keys: NDArray[np.uint8], lengths: NDArray[np.int64], rows: NDArray[Any], out: NDArray[Any]
    ) -> None:
        """Convert rows to the target's dtype, entry by entry, so that an error names the document."""
        cuts = itertools.pairwise(offsets_of(lengths).tolist())
        for key, (begin, end) in zip(key_list(keys), cuts, strict=True):
            self._to.encode(rows[begin:end], out[begin:end], what=f"document {key.hex()}")

    # --- what the target should hold ---------------------------------------------------------------------------------

    def _part(
        self,
        keys: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        columns: dict[str, NDArray[Any]],
        corrupt: list[bytes],
    ) -> Part:
        """Return a part with the checksums that the target should have.

        Of an equal recipe they are the source's, with which the rows were compared just now; else they are computed
        from the source's rows, by docs/format.md.
        """
        offsets, extras = offsets_of(lengths), [name for name in sorted(EXTRAS) if name in columns]
        if self.same:
            demanded = self._source.stored_checksums(keys)
        else:
            seeds = checksum.entry_seeds(self._seed, keys, lengths, has_token_ids=TOKEN_IDS in columns)
            main = [columns[name] for name in (TOKEN_IDS, VALUES) if name in columns]
            sums = checksum.chain(seeds.tolist(), main, offsets[:-1], lengths)
            more = checksum.chain(sums, [columns[name] for name in extras], offsets[:-1], lengths) if extras else None
            rest = np.zeros(len(keys), np.uint64) if more is None else np.array(more, np.uint64)
            demanded = np.stack([lengths.astype(np.uint64), np.array(sums, np.uint64), rest], axis=1)
        nbytes = int(offsets[-1]) * self._from.stored.itemsize * self._source.recipe.hidden_size
        return Part(keys, lengths, columns, demanded, corrupt, nbytes)
