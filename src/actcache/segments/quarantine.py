"""Quarantine: corrupt entries and unreadable segments leave the space, and their bytes are kept aside.

quarantine/<name>.safetensors    the bytes of corrupt entries, as they were found
quarantine/<segment>             a segment that cannot be read
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DataError, FormatVersionError
from actcache.format import safetensors
from actcache.format.ragged import offsets_of
from actcache.segments.compaction import merge, survey
from actcache.segments.segment import new_name, sequence_of
from actcache.segments.snapshot import SegmentedSnapshot

if TYPE_CHECKING:
    from actcache.segments.space_driver import SegmentedSpace


def quarantine(space: SegmentedSpace, keys: NDArray[np.uint8]) -> int:
    """Keep the bytes of these entries aside, then delete every copy of them; return how many there were.

    An older copy, that an overwritten one has, goes as well: to serve it would be wrong.
    """
    with space.without_index():
        return _quarantine(space, space.snapshot(), keys)


def _quarantine(space: SegmentedSpace, snapshot: SegmentedSnapshot, keys: NDArray[np.uint8]) -> int:
    keys = np.unique(np.ascontiguousarray(keys), axis=0)
    located = snapshot.locate(keys)
    keys, located = keys[located.found], located[located.found]
    if not len(keys):
        return 0
    arrays: dict[str, NDArray[np.generic]] = {
        "keys": keys,
        "offsets": offsets_of(located.tokens),
        "checksums": located.checksums,
    }
    for name, (dtype, trailing) in space.columns.items():
        rows = np.zeros((int(located.tokens.sum()), *trailing), dtype)
        begin = 0
        for i, tokens in enumerate(located.tokens.tolist()):
            if snapshot.has(name, located[i : i + 1])[0]:
                with suppress(DataError):  # its segment is gone or cut short: zeros stand for what cannot be read
                    snapshot.gather(located[i : i + 1], {name: rows[begin : begin + tokens]}, None, lambda *_: None)
                arrays[name] = rows
            begin += tokens
    held = space.quarantined()
    name = new_name(1 + max(map(sequence_of, held), default=0))
    segments = " ".join(snapshot.served()[number].name for number in located.segment.tolist())
    data = safetensors.dumps(arrays, {"actcache_quarantine": "1", "segments": segments})
    space.place.publish_bytes(f"{space.folder}/quarantine/{name}.safetensors", data, replace=True)
    return space.delete(keys)


def examine(space: SegmentedSpace) -> dict[str, str]:
    """Open every segment by its own description, which the index spares a reader; return which cannot be, and why."""
    with space.without_index() as unread:
        return {**space.damaged, **unread}


def set_aside(space: SegmentedSpace) -> list[str]:
    """Move the segments that cannot be read; return their names.

    Those that can be read only because an index tells where everything lies are written anew first.
    """
    with space.without_index() as unread:
        found = [name for name in (*space.damaged, *unread) if not _newer(space, name)]
        snapshot = space.snapshot()
        for live in survey(snapshot, found):
            if live.tokens and not merge(space, snapshot, [live]):
                found.remove(live.segment.name)  # nothing is moved that could not be saved
    for name in found:
        source = space.segment_name(name)
        space.place.move(source, f"{space.folder}/quarantine/{source.rpartition('/')[2]}")
    return sorted(found)


def _newer(space: SegmentedSpace, name: str) -> bool:
    """Return whether a segment is of a newer release, which can read it."""
    try:
        space.open_segment(name)
    except FormatVersionError:
        return True
    except (DataError, OSError):
        pass
    return False
