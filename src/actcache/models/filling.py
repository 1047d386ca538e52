"""Filling: documents are looked up, tokenized, sorted by length, computed in batches, and put."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from operator import length_hint
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import NonFiniteError, UsageError
from actcache.format.keys import Document
from actcache.format.ragged import offsets_of
from actcache.io.buffers import BufferPool
from actcache.io.notebook import Shown
from actcache.models import proof
from actcache.models.agreement import Agreement, before_adding
from actcache.models.budget import ByteBudget, Shared, most_bytes
from actcache.models.canary import Encoder
from actcache.models.documents import DocumentsWithColumns, TokenColumns, check_texts, chunked, streamed
from actcache.models.error_budget import peeked
from actcache.models.lower_half import TOKEN_BUDGET, check_token_budget, plan_encoded
from actcache.models.partition import Part, Partition
from actcache.models.passages import PassageParts, flattened
from actcache.models.processing import Made
from actcache.models.progress import FillProgress
from actcache.models.sites import Site
from actcache.models.tokenizing import DocumentEncoder
from actcache.store.contributions import Contribution
from actcache.store.contributor import Contributor
from actcache.store.document_entries import entry_keys, find_entries
from actcache.store.space import Space
from actcache.store.store import Store

CHUNK = DocumentEncoder.chunk  # documents that are looked up, tokenized and sorted by length at a time
_GROUP = 8  # batches whose rows are held before they are put
_PUT_SECONDS = 10.0  # or fewer, where computing them takes longer: rows wait no longer than this, or one batch

Advance = Callable[[int, int, int], object]

#: What of a report adds up.
_COUNTED = (
    *("documents", "present", "computed", "tokens", "left_out", "passages", "new_passages", "reused_tokens"),
    *("nbytes", "segments"),
)


@dataclass(frozen=True)
class FillReport(Shown):
    """What a fill did."""

    documents: int  # given: those present (stored before, or given twice), computed and left out
    present: int
    computed: int  # and stored by this fill
    tokens: int  # computed
    seconds: float
    left_out: int = 0  # of the documents, those that a bound on the bytes had no room for
    spaces: dict[int | str, str] = field(default_factory=dict)  # fingerprints by layer, or site
    passages: int = 0  # of the documents, where they are cut into passages; one that stands twice counts twice
    new_passages: int = 0  # computed, and stored, by this fill
    reused_tokens: int = 0  # of passages that were stored before, or stand twice
    nbytes: int = 0  # of the rows that were stored, and of what stands beside them; before compression
    segments: int = 0  # that were published; those that were merged since count, too
    partition: str | None = None  # "3/8"; None for all documents, and for a sum
    contributions: tuple[Contribution, ...] = ()  # of a fill by Ray's workers: what each has stored

    def __add__(self, other: FillReport) -> FillReport:
        """Return what two fills did that ran beside each other, each of a partition of its own.

        Counts add up; the seconds are the longer one's.

        Raises:
            UsageError: they filled other spaces.
        """
        if self.spaces != other.spaces:
            raise UsageError("reports of fills of other spaces do not add up: the sum would be of no space")
        counts = {name: getattr(self, name) + getattr(other, name) for name in (*_COUNTED, "contributions")}
        return FillReport(**counts, seconds=max(self.seconds, other.seconds), spaces=self.spaces)

    def since(self, before: FillReport) -> FillReport:
        """Return what a fill has done since an earlier report of its own."""
        return replace(self, **{name: getattr(self, name) - getattr(before, name) for name in _COUNTED})


@dataclass(eq=False)
class _Work:
    """A document that is to be computed."""

    position: int  # in the texts
    document: bytes  # its key
    keys: list[bytes]  # of its entries
    entries: Sequence[Made]
    sites: tuple[Site, ...]  # where it is missing
    own: Mapping[str, NDArray[Any]] | None = None  # the caller's own columns of its one entry
    computed: int = 0  # how many of its entries

    @property
    def tokens(self) -> int:
        return sum(entry.length for entry in self.entries)


class _Rows:
    """The rows of a group's entries at one site, one entry's after another's, as they come to be computed."""

    def __init__(self, offsets: NDArray[np.int64], memory: BufferPool) -> None:
        self._offsets, self._memory = offsets, memory  # [n + 1] where each entry's rows begin
        self._values: NDArray[np.generic] | None = None  # [T, hidden]

    def take(self, batch: NDArray[np.int64], arrays: Sequence[NDArray[np.generic]]) -> None:
        """Copy the rows of some entries, given by their positions in the group."""
        dtype = np.result_type(*{array.dtype for array in arrays})
        if self._values is None:
            self._values = self._memory.take((int(self._offsets[-1]), *arrays[0].shape[1:]), dtype)
        wider = np.result_type(dtype, self._values.dtype)
        if wider != self._values.dtype:  # no digit is lost
            self._values = self._values.astype(wider)
        first, last = int(batch[0]), int(batch[-1])
        if np.array_equal(batch, np.arange(first, last + 1)):
            np.concatenate(arrays, out=self._values[self._offsets[first] : self._offsets[last + 1]])
        else:
            for i, array in zip(batch.tolist(), arrays, strict=True):
                self._values[self._offsets[i] : self._offsets[i + 1]] = array

    def of(self, entries: NDArray[np.int64]) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
        """Return the rows of some entries, in their order, and where each one's begin, ``[n + 1]``."""
        assert self._values is not None
        first = np.flatnonzero(np.diff(entries, prepend=-2) != 1)  # of each stretch of neighbours
        last = np.append(first[1:], len(entries)) - 1
        begins, ends = self._offsets[entries[first]].tolist(), self._offsets[entries[last] + 1].tolist()
        parts = [self._values[begin:end] for begin, end in zip(begins, ends, strict=True)]
        lengths = self._offsets[entries + 1] - self._offsets[entries]
        return parts[0] if len(parts) == 1 else np.concatenate(parts), offsets_of(lengths)


class _Stored:
    """Counts what a fill has stored. Called with documents of ``absent``, which loses them."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self.absent: dict[bytes, list[Site]] = {}
        self.documents = self.tokens = 0

    def __call__(self, some: list[_Work]) -> None:
        tokens = sum(work.tokens for work in some)
        self.documents, self.tokens = self.documents + len(some), self.tokens + tokens
        for work in some:
            del self.absent[work.document]
        self._advance(len(some), len(some), tokens)


class Filler:
    """Fills the spaces of one model's sites in one pass. Not thread-safe.

    The agreements hold each site's space and lower half, and one encoder; they are checked before anything is
    computed, and again where weights or hooks have changed meanwhile.
    """

    _now = staticmethod(time.monotonic)  # a test has another clock

    def __init__(self, store: Store, agreements: Sequence[Agreement]) -> None:
        self._store, self.agreements = store, list(agreements)
        self._spaces = {one.lower.site: one.space for one in agreements}
        self._lowers = {one.lower.site: one.lower for one in agreements}
        self._encoder = agreements[0].encoder
        self._marks: object = None  # of the lower half when it was checked
        self.so_far: Callable[[], FillReport] | None = None  #: counts documents of the fill that runs, or ran last

    @property
    def encoder(self) -> Encoder:
        return self._encoder

    @property
    def spaces(self) -> list[Space]:
        return list(self._spaces.values())

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The names of the spaces that are filled."""
        return tuple(space.recipe.fingerprint for space in self.spaces)

    def fill(
        self,
        texts: Iterable[Document],
        token_budget: int,
        progress: bool,
        max_bytes: int | str | None = None,
        own: DocumentsWithColumns | None = None,
        partition: Partition | None = None,
    ) -> FillReport:
        """Compute what is missing; flushed when it returns, and when it is interrupted. See ``Recycler.fill``.

        ``own``: what the texts come from, where they have columns.
        """
        check_texts(texts)
        if own is not None:
            self.check_columns(own.beside)
        budget = self._prepared(max_bytes)
        total = length_hint(texts, -1)
        if partition is None:
            chunks = chunked(streamed(texts), self._encoder.chunk)
            parts: Iterable[Part] = ((range(first, first + len(chunk)), chunk) for first, chunk in chunks)
        else:
            parts = partition.parts(streamed(texts), self._encoder.chunk, self._encoder.keys)
            total = -1 if total < 0 else total // partition.of  # about: keys fall to all shares alike
        with FillProgress(None if total < 0 else total, show=progress) as bar:
            return self._fill(parts, token_budget, bar.advance, budget, own, partition)

    def looked_over(self, texts: Iterable[Document], partition: Partition | None) -> Iterable[Document]:
        """Return the texts. Where a space is yet to come, raise first what ``fill`` would of its first documents: one
        that is refused leaves no space behind."""
        if all(space.stands for space in self.spaces):
            return texts
        first, texts = peeked(texts, self._encoder.chunk)
        keys = self._encoder.keys(first, 0)
        mine = [i for i, key in enumerate(keys) if partition is None or partition.has(key)]
        self._encoder.encode([first[i] for i in mine], mine)
        return texts

    def fill_parts(
        self,
        parts: Iterable[Part],
        *,
        advance: Advance,
        token_budget: int = TOKEN_BUDGET,
        max_bytes: int | str | None = None,
        shared: Shared | None = None,
        number: int = 0,
        partition: Partition | None = None,
        contributor: Contributor | None = None,
        own: TokenColumns | None = None,
    ) -> FillReport:
        """Do this process's part of a fill by several; see ``models.parallel`` and ``models.cluster``.

        Args:
            parts: documents that somebody else has numbered; each is looked up, tokenized and sorted by length as one.
            advance: told of documents that are stored, and of those computed just now and their tokens.
            shared, number: see ``ByteBudget``.
            partition, contributor: whose share it is, and who notes in the store what was stored of it.
            own: what stands beside the documents' tokens, by position.
        """
        if own is not None:
            self.check_columns(own.beside)
        budget = self._prepared(max_bytes, shared, number)
        return self._fill(parts, token_budget, advance, budget, own, partition, contributor)

    def _prepared(
        self, max_bytes: int | str | None, shared: Shared | None = None, number: int = 0
    ) -> ByteBudget | None:
        """Make sure that the store can be written to, and that the lower half computes the numbers of the spaces."""
        self._store.check_writable()
        self._check()
        spaces = list(self._spaces.values())
        return None if max_bytes is None else ByteBudget(max_bytes, self._store, spaces, shared, number)

    def _check(self) -> None:
        before_adding(self.agreements)
        self._marks = self._marked()

    def _marked(self) -> object:
        return [lower.marks() for lower in self._lowers.values()]

    def check_columns(self, names: tuple[str, ...]) -> None:
        """Refuse columns before anything is computed that no space of these can take, with a ``UsageError``."""
        if self._encoder.passages is not None:
            raise UsageError("columns are of whole documents, and these are cut into passages, which others share")
        for space in self._spaces.values():
            if space.schema is not None and set(space.schema.names) != set(names):
                there = ", ".join(space.schema.names)
                raise UsageError(
                    f"this space's own columns are {there}, and these are {', '.join(names)}: a space has one set"
                )

    def _fill(
        self,
        parts: Iterable[Part],
        token_budget: int,
        advance: Advance,
        budget: ByteBudget | None,
        own: TokenColumns | None = None,
        partition: Partition | None = None,
        contributor: Contributor | None = None,
    ) -> FillReport:
        token_budget, start = check_token_budget(token_budget), time.monotonic()
        before = [space.written for space in self.spaces]
        if partition is not None and contributor is None:
            contributor = Contributor(self.spaces, str(partition))
        counted = None
        if isinstance(self._encoder, DocumentEncoder) and self._encoder.passages is not None:
            tell = advance
            parts = counted = PassageParts(parts, self._encoder, self._absent, lambda done, new: tell(done, new, 0))

            def advance(done: int, computed: int, tokens: int) -> None:  # documents are told of as wholes
                tell(0, 0, tokens)

        if contributor is not None:
            then, noted = advance, contributor

            def advance(done: int, computed: int, tokens: int) -> None:  # after each put, which are seconds apart
                noted.note()
                then(done, computed, tokens)

        documents = left_out = 0
        full = compared = False
        stored = _Stored(advance)
        spaces = {site.name: space.recipe.fingerprint for site, space in self._spaces.items()}

        def so_far() -> FillReport:
            present, seconds = documents - stored.documents - left_out, time.monotonic() - start
            counts = (documents, present, stored.documents, stored.tokens)
            report = FillReport(*counts, seconds, left_out, spaces)
            return report if counted is None else _of_documents(report, counted)

        self.so_far = so_far
        memory = {site: BufferPool(1) for site in self._spaces}
        for space in self._spaces.values():
            space.merge_tiers(budget is None)
        try:
            for positions, chunk in _cut(parts, self._encoder.chunk):
                keys = self._encoder.keys(chunk, positions[0] if chunk else 0)
                absent = self._absent(keys)
                documents += len(chunk)
                if not compared and (known := [key for key in dict.fromkeys(keys) if key not in absent]):
                    compared = True
                    for agreement in self.agreements:
                        agreement.of_present(known)
                advance(len(chunk) - len(absent), 0, 0)
                if absent and not full:
                    work = self._encoded(chunk, positions, keys, absent)
                    if own is not None:
                        _take_columns(work, own)
                    stored.absent = absent
                    for some in [work] if budget is None else self._admitted(work, budget):
                        for group in _groups(some, _GROUP * token_budget):
                            self._record(group, token_budget, stored, memory)
                    full = bool(absent)
                if own is not None and chunk:
                    own.forget(positions[-1] + 1)
                if absent:
                    copies = Counter(keys)
                    left_out += sum(copies[key] for key in absent)
                    advance(len(absent), 0, 0)
        finally:
            with ExitStack() as stack:  # all of them, also where one fails
                if contributor is not None:
                    stack.callback(contributor.note)  # the last one
                for space in self._spaces.values():
                    stack.callback(space.merge_tiers, True)
                    stack.callback(space.flush)
        done = [space.written.since(then) for space, then in zip(self.spaces, before, strict=True)]
        return replace(
            so_far(),
            nbytes=sum(one.nbytes for one in done),
            segments=sum(one.segments for one in done),
            partition=None if partition is None else str(partition),
        )

    def _admitted(self, work: list[_Work], budget: ByteBudget) -> Iterator[list[_Work]]:
        """Yield what there is room for, in the texts' order up to the first document that has none.

        What was yielded is put when this goes on. It took less than was promised: flushed and measured, there is more.
        """
        rest = sorted(work, key=lambda one: one.position)
        sizes = [self._most_bytes(one) for one in rest]
        while rest:
            count = budget.admit(sizes)
            if not count:
                for space in self._spaces.values():
                    space.flush()
                budget.remeasure()
                count = budget.admit(sizes)
            if not count:
                return
            yield rest[:count]
            rest, sizes = rest[count:], sizes[count:]

    def _most_bytes(self, work: _Work) -> int:
        recipes, extras = [self._spaces[site].recipe for site in work.sites], self._encoder.extras
        return sum(most_bytes(recipe, extras, one.length) for recipe in recipes for one in work.entries)

    def missing(self, texts: Iterable[Document]) -> list[int]:
        """Return the positions of the documents that a fill would compute. See ``Recycler.missing``."""
        lacking: list[int] = []
        seen: set[bytes] = set()
        for first, chunk in chunked(streamed(texts), self._encoder.chunk):
            positions: Sequence[int] = range(first, first + len(chunk))
            if isinstance(self._encoder, DocumentEncoder) and self._encoder.passages is not None:
                positions, chunk = flattened(self._encoder, chunk, positions)
            keys = self._encoder.keys(chunk, first)
            absent = self._absent(keys)
            for position, key in zip(positions, keys, strict=True):
                if key in absent and key not in seen:
                    seen.add(key)
                    lacking.append(position)
        return list(dict.fromkeys(lacking))

    def supply(self, texts: Sequence[Document], positions: Sequence[int], token_budget: int) -> None:
        """Compute and put what is missing of a few documents, not flushed; errors name their ``positions``."""
        chunk = list(texts)
        if isinstance(self._encoder, DocumentEncoder) and self._encoder.passages is not None:
            positions, chunk = flattened(self._encoder, chunk, positions)
        keys = self._encoder.keys(chunk, positions[0] if chunk else 0)
        memory = {site: BufferPool(1) for site in self._spaces}
        for group in _groups(self._encoded(chunk, positions, keys, self._absent(keys)), _GROUP * token_budget):
            self._record(group, token_budget, lambda some: None, memory)

    def _absent(self, keys: list[bytes]) -> dict[bytes, list[Site]]:
        """Return the keys of documents that are to be computed, with the sites where they are missing."""
        absent: dict[bytes, list[Site]] = {}
        for site, space in self._spaces.items():
            for key, found in zip(keys, find_entries(space, keys, self._encoder.windows), strict=True):
                if not found and site not in absent.setdefault(key, []):
                    absent[key].append(site)
        return absent

    def _encoded(
        self, chunk: list[Document], positions: Sequence[int], keys: list[bytes], absent: dict[bytes, list[Site]]
    ) -> list[_Work]:
        """Return what is to be computed, tokenized."""
        first = {key: i for i, key in reversed([*enumerate(keys)])}  # of one given twice, the first
        places = [first[key] for key in absent]
        spec = self._encoder.windows
        some = [chunk[i] for i in places], [positions[i] for i in places]
        encoded: Sequence[Sequence[Made]] = self._encoder.encode(*some)
        return [
            _Work(positions[i], key, entry_keys(key, len(entries), spec), entries, tuple(sites))
            for i, (key, sites), entries in zip(places, absent.items(), encoded, strict=True)
        ]

    def _record(
        self,
        group: list[_Work],
        token_budget: int,
        stored: Callable[[list[_Work]], object],
        memory: dict[Site, BufferPool],
    ) -> None:
        """Compute and put some documents, each with all its entries at once.

        They are put, and ``stored`` is told, when all are computed, and where that takes long, those that are complete
        meanwhile; also before an error or an interrupt ends it. ``memory``: for rows, by site; one group uses the
        other's.
        """
        entries = [(work, i) for work in group for i in range(len(work.entries))]
        lengths = [work.entries[i].length for work, i in entries]
        sites = list(dict.fromkeys(site for work in group for site in work.sites))
        lower = self._lowers[sites[0]]
        if self._marked() != self._marks:
            self._check()
        rows = {site: _Rows(offsets_of(np.array(lengths)), memory[site]) for site in sites}
        counts = np.array([len(work.entries) for work in group])
        first = dict(zip(group, offsets_of(counts)[:-1].tolist(), strict=True))  # position of each one's first entry
        waiting: list[_Work] = []  # complete, and not put

        def put_complete() -> None:
            try:
                for site in sites:
                    works = [work for work in waiting if site in work.sites]
                    if works:
                        places = [i for work in works for i in range(first[work], first[work] + len(work.entries))]
                        self._put(site, works, *rows[site].of(np.array(places)))
            except Exception:
                waiting.clear()  # they would fail again
                raise
            done = list(waiting)
            waiting.clear()
            stored(done)

        put = now = self._now()
        compared = False
        try:
            for batch in plan_encoded([work.entries[i] for work, i in entries], token_budget):
                some = [entries[position] for position in batch]
                inputs = [work.entries[i] for work, i in some]
                computed = lower.run_encoded(inputs, sites)
                if not compared and lower.family.found is not None:  # what no table names may look at its batch
                    compared = True
                    proof.in_company(lower, inputs, computed[lower.site], seed=len(entries))
                for site, arrays in computed.items():
                    rows[site].take(batch, arrays)
                for work, _ in some:
                    work.computed += 1
                works = dict.fromkeys(work for work, _ in some)
                waiting += [work for work in works if work.computed == len(work.entries)]
                before, now = now, self._now()
                if waiting and 2 * now - before - put > _PUT_SECONDS:  # after another batch like this one
                    put_complete()
                    put = now = self._now()
            put_complete()
        finally:
            if waiting:  # an interrupt may have come while they were put, too
                put_complete()

    def _put(self, site: Site, works: list[_Work], values: NDArray[np.generic], offsets: NDArray[np.int64]) -> None:
        entries = [entry for work in works for entry in work.entries]
        names = ("token_ids", *self._encoder.extras) if self._encoder.has_token_ids else ()
        columns: dict[str, Any] = {name: np.concatenate([getattr(entry, name) for entry in entries]) for name in names}
        own = [work.own for work in works if work.own is not None]
        if own:
            columns["columns"] = {name: np.concatenate([one[name] for one in own]) for name in own[0]}
        try:
            # One call, so that all windows of a document become visible together.
            self._spaces[site].put_packed([key for work in works for key in work.keys], values, offsets, **columns)
        except NonFiniteError as error:
            owners = [work.position for work in works for key in work.keys if key.hex() in str(error)]
            raise type(error)(f"position {owners[0]} of the texts: {error}" if owners else str(error)) from error


def _take_columns(work: list[_Work], own: TokenColumns) -> None:
    """Give documents their own columns; ``UsageError`` where one is cut into windows, which have other tokens."""
    for one in work:
        if len(one.entries) != 1:
            raise UsageError(
                f"position {one.position} of the texts is cut into {len(one.entries)} windows, and columns are of "
                "whole documents: give shorter ones, or put each window with its columns (Space.put)"
            )
        one.own = own.take(one.position, one.entries[0].length)


def _of_documents(passages: FillReport, counted: PassageParts) -> FillReport:
    """Return what a fill did with documents, from what it says of their passages."""
    return replace(
        passages,
        documents=counted.documents,
        present=counted.present,
        computed=counted.documents - counted.present - counted.left_out,
        left_out=counted.left_out,
        passages=counted.passages,
        new_passages=passages.computed,
        reused_tokens=counted.tokens - passages.tokens,
    )


def _cut(parts: Iterable[Part], most: int) -> Iterator[Part]:
    """Cut parts into such of ``most`` documents."""
    for positions, chunk in parts:
        for start in range(0, len(chunk), most) or (0,):
            yield positions[start : start + most], chunk[start : start + most]


def _groups(work: list[_Work], tokens: int) -> Iterator[list[_Work]]:
    """Cut work, longest first, into groups of about so many tokens: what is held in memory before it is put."""
    group: list[_Work] = []
    held = 0
    for one in sorted(work, key=lambda one: -one.entries[0].length):
        group.append(one)
        held += one.tokens
        if held >= tokens:
            yield group
            group, held = [], 0
    if group:
        yield group
