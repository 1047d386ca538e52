"""What a fill would do, before it does it: how much is there, how many bytes the rest takes, and how long."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from actcache.admin.planning import CorpusSize, nbytes_of
from actcache.errors import SpaceNotFoundError, StoreNotFoundError
from actcache.format.arguments import nbytes_of as size_of
from actcache.format.keys import Document, Windows
from actcache.format.media import By
from actcache.models.budget import RESERVE, taken
from actcache.models.documents import chunked, document_keys, streamed
from actcache.models.families import base_model_of, family_of
from actcache.models.lower_half import LowerHalf
from actcache.models.partial_vocabulary import vocabulary_size
from actcache.models.pretrained import load_pretrained
from actcache.models.processing import MediaEncoder, processor_of, takes_features
from actcache.models.recycler import Recycler
from actcache.models.sites import depth_of, expanded, several
from actcache.models.timing import measure, measure_features
from actcache.models.tokenizing import DocumentEncoder, check_max_length
from actcache.store.document_entries import find_entries
from actcache.store.space import Space
from actcache.store.store import open_store

_SAMPLE = 2000  # documents whose lengths are looked at
_CHUNK = 2048  # documents that are looked up at a time
_TOKENIZED = 200_000  # documents whose lengths are compared with what the model takes


@dataclass(frozen=True)
class Forecast:
    """What a fill would do."""

    documents: int  # given, each counted once
    present: int  # of those, stored already, at all the sites
    tokens: int  # about, of the others; of windows, each with what it shares with the next one
    nbytes: int  # about, that the others take, at all the sites where they are missing
    seconds: float  # about, by computing some of them here; tokenizing and writing are not counted
    fits: int | None = None  # about how many of the others a bound on the bytes has room for; None without one
    too_long: int = 0  # of the others, those longer than ``max_length``: about, where there are very many
    first_too_long: int | None = None  # the position of the first of them, from 0, among all that were given
    max_length: int | None = None  # tokens that a document may have
    passages: int = 0  # different ones that the documents are cut into; ``fits`` counts these
    new_passages: int = 0  # of them, those that are not there


@dataclass
class _Lookup:
    """What of a corpus is there, and what is missing."""

    documents: int = 0
    passages: int = 0  # where documents are cut so, the others count these
    present: int | None = None  # documents of which all passages are there
    lacking: Counter[str] = field(default_factory=Counter)  # documents by site
    deepest: Counter[int] = field(
        default_factory=Counter
    )  # documents by the layers below the last site that lacks them
    sample: list[Any] = field(default_factory=list)  # of those that are missing
    longer: int = 0  # of those that were tokenized
    first_longer: int | None = None  # its position
    tokenized: int = 0

    @property
    def missing(self) -> int:
        return self.deepest.total()

    def tokenize(self, documents: Sequence[Any], positions: Sequence[int], encoder: DocumentEncoder, most: int) -> None:
        """Find out which documents have more than so many tokens; of the first ones only, where there are very many."""
        if self.tokenized >= _TOKENIZED:
            return
        self.tokenized += len(documents)
        for position, windows in zip(positions, encoder.encode(documents, positions), strict=True):
            if windows[0].length > most:
                self.longer += 1
                self.first_longer = position if self.first_longer is None else self.first_longer


def forecast(
    store: str,
    texts: Iterable[Document],
    model: str,
    *,
    layers: Sequence[int | str] | str = (),
    sites: Sequence[str] = (),
    dtype: str | None = None,
    devices: Sequence[str | None] = (None,),
    max_length: int | None = None,
    too_long: Any = "refuse",
    max_bytes: int | str | None = None,
    key_by: By = "content",
) -> Forecast:
    """Say what a fill of these texts would do; stores nothing, and makes no store. Arguments and errors are a fill's.

    The texts are streamed; a key of each is held. The time is divided by the number of different ``devices``: processes
    on the CPU share its cores.
    """
    given = several(layers, sites)
    documents = streamed(texts)
    limit = None if max_bytes is None else size_of("max_bytes", max_bytes)
    options: dict[str, Any] = {"dtype": dtype, "max_length": max_length, "too_long": too_long, "key_by": key_by}
    with ExitStack() as stack:
        loaded = load_pretrained(model, [], devices[0], None)
        base = base_model_of(loaded[0])
        family = family_of(base)
        halves = {str(half.site): half for half in (LowerHalf(base, family, w) for w in expanded(base, family, given))}
        depths = {name: depth_of(base, family, half.site) for name, half in halves.items()}
        spaces: dict[str, Space] = {}
        used = 0
        opened = None
        with suppress(StoreNotFoundError):
            opened = stack.enter_context(open_store(store, mode="r"))
        if opened is not None:
            for name in halves:
                with suppress(SpaceNotFoundError):
                    spaces[name] = stack.enter_context(Recycler(*loaded, site=name, store=opened, **options)).space
            used = taken(opened, [space.recipe.fingerprint for space in spaces.values()])
        spec, encoder, lengths, most, cutter, given_as = None, None, None, None, None, None
        if takes_features(base):
            counted = next(iter(halves.values())).count_rows
            encoder = MediaEncoder(loaded[1], base, counted, key_by=key_by, too_long=too_long)
            keys = encoder.keys
        else:
            tokenizer = processor_of(loaded[1], base)
            most = check_max_length(max_length, tokenizer, family.max_tokens(base.config))
            given_as = DocumentEncoder(tokenizer, most, too_long, vocabulary=vocabulary_size(base))
            spec, most, keys = given_as.windows, given_as.max_length, document_keys
            if spec is None and given_as.passages is None and most is not None:
                lengths = DocumentEncoder(tokenizer, None, vocabulary=vocabulary_size(base))
            cutter = given_as if given_as.passages is not None else None
        found = _look_up(documents, depths, spaces, spec, keys, lengths, most, cutter)
    if not found.missing:
        fits = None if limit is None else 0
        return Forecast(found.documents, found.documents, 0, 0, 0.0, fits, passages=found.passages)
    last = max(found.deepest)
    deepest = next(half.site for name, half in halves.items() if depths[name] == last)
    longest = None if cutter is not None else max_length if spec is None else spec.max_length
    if encoder is None:
        timing = measure(model, found.sample, layer=deepest, device=devices[0], max_length=longest)
    else:
        timing = measure_features(LowerHalf(base, family, deepest), encoder, found.sample)
    parts = [[length] for length in timing.lengths]  # of each document of the sample, the tokens of its entries
    if spec is not None and given_as is not None:
        parts = [[window.length for window in windows] for windows in given_as.encode(found.sample)]
    each = sum(map(len, parts)) / len(parts)
    length = sum(map(sum, parts)) / len(parts)
    sizes = {name: CorpusSize(round(count * each), round(count * length)) for name, count in found.lacking.items()}
    kind = dtype or timing.dtype
    nbytes = sum(nbytes_of(size, halves[name].hidden_size, kind) for name, size in sizes.items())
    # Layers cost about the same each.
    layers_of_tokens = sum(count * length * (depth or 1) for depth, count in found.deepest.items())
    seconds = layers_of_tokens * timing.lower / (last or 1) / len(set(devices))
    room = None if limit is None else max(0, limit - RESERVE - used)
    fits = None if room is None else min(found.missing, room * found.missing // nbytes)
    present = found.documents - found.missing if found.present is None else found.present
    longer = round(found.longer * found.missing / found.tokenized) if found.tokenized else 0
    cut = (longer, found.first_longer, most, found.passages, found.missing if found.passages else 0)
    return Forecast(found.documents, present, round(found.missing * length), nbytes, seconds, fits, *cut)


def _look_up(
    texts: Iterator[Document],
    depths: Mapping[str, int],
    spaces: Mapping[str, Space],
    spec: Windows | None,
    keys_of: Callable[[Sequence[Any], int], list[bytes]],
    lengths: DocumentEncoder | None = None,
    most: int | None = None,
    cutter: DocumentEncoder | None = None,
) -> _Lookup:
    found = _Lookup()
    seen: set[bytes] = set()
    lacked: set[bytes] = set()  # passages
    documents: dict[bytes, list[bytes]] = {}  # their passages, where they are cut so
    chance = random.Random(0)
    for first, chunk in chunked(texts, _CHUNK):
        if cutter is not None:
            cut = cutter.cut(chunk, range(first, first + len(chunk)))
            theirs = ([one.key() for one in passages] for passages in cut)
            documents |= dict(zip(keys_of(chunk, first), theirs, strict=True))
            chunk = [one for passages in cut for one in passages]
        numbered = zip(range(first, first + len(chunk)), chunk, keys_of(chunk, first), strict=True)
        new: dict[bytes, Any] = {}
        positions: dict[bytes, int] = {}
        for position, text, key in numbered:
            if key not in seen and key not in new:
                new[key], positions[key] = text, position
        seen.update(new)
        missing: dict[bytes, int] = {}  # how deep
        for name, depth in depths.items():
            there = find_entries(spaces[name], list(new), spec) if name in spaces else [[]] * len(new)
            lacking = [key for key, entries in zip(new, there, strict=True) if not entries]
            found.lacking[name] += len(lacking)
            missing.update({key: max(depth, missing.get(key, 0)) for key in lacking})
        lacked |= missing.keys() if cutter is not None else set()
        if lengths is not None and most is not None:
            found.tokenize([new[key] for key in missing], [positions[key] for key in missing], lengths, most)
        for key, depth in missing.items():
            found.deepest[depth] += 1
            if len(found.sample) < _SAMPLE:
                found.sample.append(new[key])
            elif (place := chance.randrange(found.missing)) < _SAMPLE:  # each has the same chance to be in the sample
                found.sample[place] = new[key]
    found.documents = len(seen)
    if cutter is not None:
        found.documents, found.passages = len(documents), len(seen)
        found.present = sum(lacked.isdisjoint(keys) for keys in documents.values())
    return found
