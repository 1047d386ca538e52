"""Quarantine: corrupt entries and unreadable segments leave the space, and their bytes are kept aside.

quarantine/<name>.safetensors    the bytes of corrupt entries, as they were found
quarantine/<segment>             a segment that cannot be read
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Columns, EntryLocations, Expected
from actcache.errors import DataError, FormatVersionError
from actcache.format import safetensors
from actcache.format.checksum import CHAINED, ORDER
from actcache.format.ragged import OWN, PAYLOAD, PAYLOAD_OFFSETS, offsets_of
from actcache.segments.catalog import Catalog
from actcache.segments.compaction import live_segments, merge
from actcache.segments.places.place import unique_names
from actcache.segments.segment import next_name
from actcache.segments.snapshot import SegmentedSnapshot

#: Whether an entry in quarantine has columns of the caller's own, and whether they are as they were put.
NO_COLUMNS, COLUMNS_INTACT, COLUMNS_DAMAGED = range(3)


def quarantine(catalog: Catalog, keys: NDArray[np.uint8]) -> int:
    """Keep the bytes of these entries aside, then delete every copy of them; return how many there were.

    An older copy, that an overwritten one has, goes as well: to serve it would be wrong.
    """
    with catalog.without_index():
        snapshot = catalog.snapshot()
        keys = np.unique(np.ascontiguousarray(keys), axis=0)
        located = snapshot.locate(keys)
        keys, located = keys[located.found], located[located.found]
        if not len(keys):
            return 0
        offsets = offsets_of(located.tokens)
        arrays: dict[str, NDArray[np.generic]] = {"keys": keys, "offsets": offsets, "checksums": located.checksums}
        bounds = offsets.tolist()
        for name, (dtype, trailing) in catalog.columns.items():
            if name == PAYLOAD:  # frames that make no rows, perhaps
                arrays |= _frames(snapshot, located)
                continue
            rows = np.zeros((bounds[-1], *trailing), dtype)
            for i in np.flatnonzero(snapshot.has(name, located)).tolist():
                arrays[name] = rows
                with suppress(DataError):  # its segment is gone or cut short: zeros stand for what cannot be read
                    own = rows[bounds[i] : bounds[i + 1]]
                    if len(snapshot.gather(located[i : i + 1], {name: own}, None, None)):
                        own[:] = 0
        if OWN in arrays:
            arrays["columns_state"] = _state_of_columns(snapshot, keys, located, catalog.columns)
        segments = " ".join(catalog.segments[number].name for number in located.segment.tolist())
        data = safetensors.dumps(arrays, {"actcache_quarantine": "1", "segments": segments})
        folder = f"{catalog.folder}/quarantine"
        name = next_name(unique_names(catalog.place, folder, ".safetensors"))
        catalog.place.publish_bytes(f"{folder}/{name}.safetensors", data, replace=True)
        return catalog.delete(keys)


def _state_of_columns(
    snapshot: SegmentedSnapshot, keys: NDArray[np.uint8], located: EntryLocations, columns: Columns
) -> NDArray[np.uint8]:
    """Return of each entry ``NO_COLUMNS``, or whether the caller's own are as they were put: their checksum is over all
    optional arrays, and not over the rows."""
    state = np.full(len(keys), NO_COLUMNS, np.uint8)
    optional = [name for name in ORDER if name in columns and name not in CHAINED]
    having = {name: snapshot.has(name, located) for name in optional}
    for i in np.flatnonzero(having[OWN]).tolist():
        state[i] = COLUMNS_DAMAGED
        with suppress(DataError):
            one, out = located[i : i + 1], dict[str, NDArray[np.generic]]()
            for name in optional:
                if having[name][i]:
                    dtype, trailing = columns[name]
                    out[name] = np.zeros((int(one.tokens[0]), *trailing), dtype)
            expected = Expected(0, keys[i : i + 1], one.checksums, snapshot.extra_checksums(one))
            if not len(snapshot.gather(one, out, None, expected)):
                state[i] = COLUMNS_INTACT
    return state


def _frames(snapshot: SegmentedSnapshot, located: EntryLocations) -> dict[str, NDArray[np.generic]]:
    """Return the frames of entries, as they are found; none of those that cannot be read."""
    found = [np.empty(0, np.uint8)]
    sizes = np.zeros(len(located.tokens), np.int64)
    for i in range(len(sizes)):
        with suppress(DataError):
            where = snapshot.frames(located[i : i + 1])
            own = np.zeros(int(where.tokens[0]), np.uint8)
            if not len(snapshot.gather(where, {PAYLOAD: own}, None, None)):
                found.append(own)
                sizes[i] = len(own)
    return {PAYLOAD: np.concatenate(found), PAYLOAD_OFFSETS: offsets_of(sizes)}


def examine(catalog: Catalog) -> dict[str, str]:
    """Open every segment by its own description, which the index spares a reader; return which cannot be, and why."""
    with catalog.without_index() as unread:
        return {**catalog.damaged, **unread}


def set_aside(catalog: Catalog) -> list[str]:
    """Move the segments that cannot be read; return their names.

    Those that can be read only because an index tells where everything lies are written anew first.
    """
    with catalog.without_index() as unread:
        found = [name for name in (*catalog.damaged, *unread) if not _newer(catalog, name)]
        snapshot = catalog.snapshot()
        for live in live_segments(snapshot, found):
            if live.tokens and not merge(catalog, snapshot, [live]):
                found.remove(live.segment.name)  # nothing is moved that could not be saved
    for name in found:
        source = catalog.segment_name(name)
        catalog.place.move(source, f"{catalog.folder}/quarantine/{source.rpartition('/')[2]}")
    return sorted(found)


def _newer(catalog: Catalog, name: str) -> bool:
    """Return whether a segment is of a newer release, which can read it."""
    try:
        catalog.open_segment(name)
    except (DataError, OSError) as error:
        return isinstance(error, FormatVersionError)
    return False
