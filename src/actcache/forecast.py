"""What a fill would do, before it does it: how much is there, how many bytes the rest takes, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actcache.errors import SpaceNotFoundError, StoreNotFoundError
from actcache.key import document_key
from actcache.models.entries import find_entries
from actcache.models.timing import measure
from actcache.planning import Corpus, nbytes_of
from actcache.recycler import Recycler
from actcache.store import open_store
from actcache.windows import Windows

_SAMPLE = 2000  # documents whose lengths are looked at


@dataclass(frozen=True)
class Forecast:
    """What a fill would do."""

    documents: int  # given, each counted once
    present: int  # of those, stored already
    tokens: int  # about, of the others; of windows, without what they share
    nbytes: int  # about, that the others take
    seconds: float  # about, by computing some of them here; tokenizing and writing are not counted


def forecast(
    store: str,
    texts: Sequence[str],
    model: str,
    *,
    layer: int,
    dtype: str | None = None,
    device: str | None = None,
    max_length: int | None = None,
    too_long: Any = "refuse",
) -> Forecast:
    """Say what a fill of these texts would do; stores nothing, and makes no store. The arguments are a fill's.

    Raises:
        ModelError: the model cannot be loaded.
        UsageError: see ``Recycler``.
        StoreError: what lies at the store's place cannot be opened.
    """
    distinct = list(dict.fromkeys(texts))
    keys = [document_key(text) for text in distinct]
    missing = distinct
    options: dict[str, Any] = {"max_length": max_length, "too_long": too_long}
    try:
        with (
            open_store(store, mode="r") as opened,
            Recycler.from_pretrained(
                model, layer=layer, store=opened, dtype=dtype, device=device, **options
            ) as recycler,
        ):
            found = find_entries(recycler.space, keys, too_long if isinstance(too_long, Windows) else None)
            missing = [text for text, entries in zip(distinct, found, strict=True) if not entries]
    except (StoreNotFoundError, SpaceNotFoundError):
        pass
    if not missing:
        return Forecast(len(distinct), len(distinct), 0, 0, 0.0)
    sample = missing[:: -(-len(missing) // _SAMPLE)]
    longest = None if isinstance(too_long, Windows) else max_length
    timing = measure(model, sample, layer=layer, device=device, max_length=longest)
    tokens = round(sum(timing.lengths) / len(sample) * len(missing))
    nbytes = nbytes_of(Corpus(len(missing), tokens), timing.model.hidden_size, dtype or timing.dtype)
    return Forecast(len(distinct), len(distinct) - len(missing), tokens, nbytes, tokens * timing.lower)
