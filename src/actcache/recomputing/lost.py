"""Entries that were lost: quarantined now, or by an earlier repair and not computed again since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.errors import FormatError
from actcache.key import key_list
from actcache.ragged import EXTRAS, TOKEN_IDS, check_offsets
from actcache.space import Space
from actcache.storage import tensorfile
from actcache.store import Store


@dataclass(frozen=True)
class Lost:
    """What is known of an entry besides its key."""

    extras: frozenset[str]  # of spans, word_ids, type_ids, what it had
    token_ids: NDArray[np.int32] | None  # as they were found: nobody vouches for them


def lost_now(space: Space, corrupt: Sequence[bytes]) -> dict[bytes, Lost]:
    """Return what lies of corrupt entries that are still in place, by key."""
    if not corrupt:
        return {}
    had = {name: space.has(name, corrupt) for name in EXTRAS}
    ids = space.salvaged_ids(corrupt)
    return {
        key: Lost(frozenset(name for name, there in had.items() if there[i]), ids[i]) for i, key in enumerate(corrupt)
    }


def lost_before(store: Store, space: Space) -> dict[bytes, Lost]:
    """Return what the space's quarantine (docs/format.md) says of entries that are not in the space, by key.

    What is no quarantine of entries (a segment that could not be read) is passed over.
    """
    lost: dict[bytes, Lost] = {}
    for name in store.driver.blobs(f"spaces/{space.recipe.fingerprint}/quarantine"):
        data = store.driver.read_blob(name) if name.endswith(".safetensors") else None
        if data is not None:
            try:
                lost |= _kept(data, name)
            except FormatError:
                continue
    keys = list(lost)
    there = space.contains(keys).tolist() if keys else []
    return {key: lost[key] for key, is_there in zip(keys, there, strict=True) if not is_there}


def _kept(data: bytes, where: str) -> dict[bytes, Lost]:
    metadata, arrays = tensorfile.loads(data, where)
    keys, offsets, ids = arrays.get("keys"), arrays.get("offsets"), arrays.get(TOKEN_IDS)
    if metadata.get("actcache_quarantine") != "1" or keys is None or offsets is None:
        raise FormatError(f"{where} holds no quarantined entries")
    if keys.dtype != np.uint8 or keys.shape[1:] != (32,) or offsets.dtype != np.int64 or offsets.ndim != 1:
        raise FormatError(f"{where} holds keys or offsets of another form")
    if ids is not None:
        if ids.dtype != np.int32 or ids.ndim != 1:
            raise FormatError(f"{where} holds token ids of another form")
        check_offsets(offsets.astype(np.int64), len(keys), len(ids), where)
    extras = frozenset(name for name in EXTRAS if name in arrays)
    own = [None] * len(keys) if ids is None else np.split(np.array(ids, np.int32), offsets[1:-1].tolist())
    return {key: Lost(extras, one) for key, one in zip(key_list(keys.astype(np.uint8)), own, strict=True)}
