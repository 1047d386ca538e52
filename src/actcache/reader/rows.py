"""Rows of tokens in batches, mixed across documents: what sparse autoencoders, crosscoders and probes train on."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import TOKEN_IDS
from actcache.entries.batch import RowBatch
from actcache.errors import MissingEntryError, ShapeError, UsageError
from actcache.format.arguments import check_choice, nbytes_of, truth, whole, whole_numbers
from actcache.format.keys import Keys, key_array
from actcache.format.ragged import offsets_of
from actcache.reader.checks import check_own, check_present, ranks_of
from actcache.reader.dealing import Deal, Span, counted, cut, remaining
from actcache.reader.exclusion import Exclusion
from actcache.reader.fetch import OwnSource
from actcache.reader.mixed_rows import MixedRows, Mixer, RowDocuments
from actcache.reader.mixing import Mixes, Mixing, documents_mixed
from actcache.reader.prefetch import Prefetch
from actcache.reader.row_delivery import DeliveredRows, Normalization, RowDelivery, row_delivery
from actcache.reader.stats import ReaderStats

_BUFFERS = 3  # one that is delivered, one that is filled, and one that batches still look into

_MOST_HEAD = 8  # a batch that is no more than such a share of the buffer has room before the rows of a mix

BESIDE = ("documents", "positions", "token_ids")


@dataclass(frozen=True)
class Place:
    """Where a reader of rows is: before the first row of an epoch, or after some batches of it."""

    epoch: int
    dealt: tuple[tuple[int, int], ...] = ()  # (ranks, batches of each): how the epoch was dealt out so far
    at: tuple[int, int] | None = None  # of a single rank: the mix that comes next, and how many of its rows are done


@dataclass(frozen=True)
class _Item:
    """A batch, and where the reader is after it; without a batch, the end of an epoch."""

    batch: DeliveredRows | None
    place: Place


class RowReader(Iterator[Any]):
    """Iterates over the rows of documents in batches ``[n, hidden]``, mixed across documents; from ``Space.rows``.

    Each row that is not left out comes exactly once an epoch. A ``for`` ends with the epoch, and the next one is the
    next epoch; one that was broken off goes on where it was. One thread at a time.

    Rows are mixed in a buffer: documents that lie one after another are read as a stretch, stretches come in random
    order, and all rows of the stretches that fit the buffer come in random order. ``documents_mixed`` says of how many
    documents a batch is. The reader holds three such buffers at most, besides those whose batches are kept: batches on
    the host are views into them. Where a batch is an eighth of the buffer or less, each has room for one more.

    Args:
        sources: a space, or several whose rows are aligned: then batches are ``[n, sites, hidden]``.
        keys: of the documents; None for all of the (first) space.
        batch_size: rows of a batch; the last one of an epoch may have fewer.
        buffer: bytes of rows that are mixed at once (``"256MiB"``, or a number).
        stretch: bytes of rows that are read one after another.
        seed: decides, with the number of the epoch, in which order rows come.
        forever: whether one epoch follows another without an end.
        drop_last: whether to leave out batches that are not full.
        exclude: which rows to leave out: a mapping with ``"token_ids"`` (those of special tokens, say), ``"positions"``
            in their documents (``[0]`` is the first token, ``[-1]`` the last), ``"mask"``, the name of a column of the
            caller's own (of the first space) that is 0 at rows to leave out, or ``"norm"``: rows whose norm is above
            that multiple of the mean norm (attention sinks), at any site.
        normalize: ``"mean-norm"`` scales rows so that their mean norm is the square root of ``hidden``; ``"standard"``
            takes away the mean and divides by the standard deviation of each dimension. By ``Space.statistics``, of all
            rows of the space; the batches are float32 then.
        beside: what to deliver beside the rows, of ``"documents"``, ``"positions"``, ``"token_ids"`` and columns of the
            caller's own (of the first space): batches are then ``RowBatch``, else arrays of rows.
        documents: one number a key, delivered as ``RowBatch.documents``; the key's position by default.
        device: a torch device for the batches; None for NumPy arrays.
        depth: batches that are delivered ahead; 0 makes each when it is asked for. Another mix is read ahead in any
            case.
        ranks: ``(rank, how many there are)``: this reader delivers its share of each epoch. Those of
            ``torch.distributed`` by default, where it is initialized.

    Raises:
        MissingEntryError: a document is not in a space.
        ShapeError: spaces do not hold the same documents; an option has another length.
        UsageError: an option does not fit; the buffer is smaller than a batch, or a document; nothing is left.
    """

    _normalization: Normalization | None = None

    def __init__(
        self,
        sources: OwnSource | Sequence[OwnSource],
        keys: Keys | None = None,
        *,
        batch_size: int = 4096,
        buffer: int | str = "256MiB",
        stretch: int | str = "1MiB",
        seed: int = 0,
        forever: bool = False,
        drop_last: bool = False,
        exclude: Mapping[str, Any] | None = None,
        normalize: str | None = None,
        beside: Sequence[str] = (),
        documents: Any = None,
        device: Any = None,
        depth: int = 2,
        ranks: tuple[int, int] | None = None,
    ) -> None:
        stacked = isinstance(sources, Sequence)
        spaces: list[Any] = list(sources) if isinstance(sources, Sequence) else [sources]
        self._batch_size, self._depth = whole("batch_size", batch_size, 1), whole("depth", depth, 0)
        self._forever, self._drop_last = truth("forever", forever), truth("drop_last", drop_last)
        self._beside = (beside,) if isinstance(beside, str) else tuple(beside)
        self._exclusion = Exclusion.of(exclude)
        if normalize is not None:
            check_choice("normalize", normalize, ("mean-norm", "standard"))
        _check_alike(spaces)
        wanted = spaces[0].key_array() if keys is None else key_array(keys)
        numbers = np.arange(len(wanted)) if documents is None else whole_numbers("documents", documents)
        if numbers.shape != (len(wanted),):
            raise ShapeError(f"{len(wanted)} keys and documents of shape {list(numbers.shape)}: give each a number")
        self._documents, order = _documents(spaces, wanted, stacked=stacked)
        self._numbers = numbers[order]
        own = [name for name in self._beside if name not in BESIDE]
        own += [self._exclusion.mask] if self._exclusion.mask is not None else []
        if own:
            check_own(spaces[0], wanted, own, mask=self._exclusion.mask, tensors=device is not None)
            self._documents = replace(self._documents, own=tuple(dict.fromkeys(own)))
        if not self._documents.has_ids and (self._exclusion.needs_ids or TOKEN_IDS in self._beside):
            raise UsageError("some of these documents were stored without token ids, so no row can be chosen by them")
        if normalize is not None or self._exclusion.norm is not None:
            moments = [space.statistics() for space in spaces]
            if self._exclusion.norm is not None:
                means = np.array([one.mean_norm for one in moments])
                self._documents = replace(self._documents, mean_norms=means if stacked else means[0])
            self._normalization = Normalization.by(normalize, moments, stacked=stacked)
        row_bytes = self._documents.row_bytes
        capacity = nbytes_of("buffer", buffer) // row_bytes
        longest = int(self._documents.lengths.max(initial=0))
        if capacity < max(self._batch_size, longest):
            what = f"a batch has {self._batch_size}" if self._batch_size > longest else f"a document has {longest}"
            raise UsageError(f"the buffer holds {capacity} rows of {row_bytes} bytes, and {what}: give more for it")
        self._mixing = Mixing(
            self._documents.lengths, capacity, nbytes_of("stretch", stretch) // row_bytes, whole("seed", seed, 0)
        )
        self._digest = self._order_digest()
        self._rank, self._ranks = ranks_of(ranks, self._digest)
        self._device = device
        self._stats = ReaderStats()
        self._delivery: tuple[int, RowDelivery] | None = None
        self._place = Place(0)
        self._run: tuple[int, Prefetch[_Item] | Generator[_Item]] | None = None
        self._stepping: float | None = None
        self._kept: NDArray[np.int64] | None = None
        if not self._exclusion:
            self._kept = self._documents.lengths
        elif not self._exclusion.by_contents:
            self._kept = self._count_kept()
        if not len(wanted) or (self._kept is not None and not self._kept.any()):
            raise UsageError("every row of these documents is left out" if len(wanted) else "there are no documents")

    def _order_digest(self) -> str:
        mixing = self._mixing
        options = (self._batch_size, mixing.capacity, mixing.stretch, mixing.seed, self._drop_last, self._exclusion)
        digest = hashlib.blake2b(repr(options).encode(), digest_size=16, person=b"actcache/rows/2")
        digest.update(np.ascontiguousarray(self._documents.keys).data)
        digest.update(np.ascontiguousarray(self._documents.lengths).data)
        return digest.hexdigest()

    # --- iterating ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> RowReader:
        return self

    def __next__(self) -> Any:
        stats = self._stats
        if self._stepping is not None:
            stats.step_seconds += time.perf_counter() - self._stepping
            self._stepping = None
        if self._run is None or self._run[0] != os.getpid():
            self._run = os.getpid(), self._begin()
        try:
            item = next(self._run[1])
            while item.batch is None:
                self._place = item.place
                stats.epochs += 1
                if not self._forever:
                    self._run = None
                    raise StopIteration
                item = next(self._run[1])
        except StopIteration:
            raise
        except BaseException:
            self._stop()  # to go on would leave out what could not be read
            raise
        self._place = item.place
        stats.batches += 1
        arrived = self._to_device().arrive(item.batch)
        self._stepping = time.perf_counter()
        if not self._beside:
            return arrived.rows
        fields = {name: value for name, value in arrived.beside.items() if name in BESIDE}
        own = {name: value for name, value in arrived.beside.items() if name not in BESIDE}
        return RowBatch(arrived.rows, **fields, columns=own)

    def _begin(self) -> Prefetch[_Item] | Generator[_Item]:
        produce = _Producer(self, self._to_device()).produce(self._place)
        if not self._depth:
            return produce
        # No cycle: a reader that nobody holds goes at once, and its thread ends by itself. The collector would find it
        # anywhere, in the middle of something for which that thread waits.
        counting = weakref.WeakMethod(self._waited)

        def waited(seconds: float, ready: int) -> None:
            if (count := counting()) is not None:
                count(seconds, ready)

        return Prefetch(produce, self._depth, waited)

    def _waited(self, seconds: float, ready: int) -> None:
        self._stats.wait_seconds += seconds
        self._stats.ready += ready

    def _stop(self) -> None:
        run, self._run = self._run, None
        if run is not None and run[0] == os.getpid():
            run[1].close()

    def _to_device(self) -> RowDelivery:
        if self._delivery is None or self._delivery[0] != os.getpid():
            dtype = self._documents.sources[0].recipe.dtype
            self._delivery = os.getpid(), row_delivery(dtype, self._device, _BUFFERS, self._normalization)
        return self._delivery[1]

    def close(self) -> None:
        """End the threads; the next ``next`` goes on where this was. Does nothing the second time."""
        self._stop()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_delivery": None, "_run": None, "_stepping": None}

    # --- where it is --------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Have the next batch be the first one of an epoch, unless the reader is in that epoch."""
        if (epoch := whole("epoch", epoch, 0)) != self._place.epoch:
            self._stop()
            self._place = Place(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the reader is: after the batch that it returned last. The same on all ranks; another number of
        ranks can go on from it."""
        place = self._place
        return {
            "epoch": place.epoch,
            "dealt": [list(one) for one in place.dealt],
            "at": None if place.at is None else list(place.at),
            "order": self._digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a state, with exactly the next row; ``UsageError`` where it is of other documents or options."""
        try:
            at = state["at"] if state["at"] is None else (int(state["at"][0]), int(state["at"][1]))
            dealt = tuple((int(ranks), int(rounds)) for ranks, rounds in state["dealt"])
            place, order = Place(int(state["epoch"]), dealt, at), state["order"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"this is no state of a reader of rows: {error!r}") from None
        numbers = itertools.chain((place.epoch,), at or (), *dealt)
        if order != self._digest or min(numbers) < 0 or any(ranks < 1 for ranks, _ in dealt):
            raise UsageError("the state is of a reader with other documents or options; start it anew")
        self._stop()
        self._place = place

    # --- what is known of it ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of batches that a whole epoch has on this rank. Where rows are left out by what they hold,
        this counts them first."""
        total = int(self.kept().sum())
        return Deal(total, self._ranks, self._batch_size, self._drop_last).rounds

    def kept(self) -> NDArray[np.int64]:
        """Return how many rows of each document are not left out, ``[n]``, in the order in which they lie."""
        if self._kept is None:
            self._kept = self._count_kept()
            if not self._kept.any():
                raise UsageError("every row of these documents is left out")
        return self._kept

    def _count_kept(self) -> NDArray[np.int64]:
        documents, counts = self._documents, list[NDArray[np.int64]]()
        for members in documents.portions(np.arange(len(documents.keys))):
            lengths = documents.lengths[members]
            starts, of_row = offsets_of(lengths), np.repeat(np.arange(len(members)), lengths)
            ids = None
            norms: NDArray[Any] | None = None
            mask: NDArray[Any] | None = None
            if self._exclusion.mask is not None:
                mask = documents.read_own(members)[self._exclusion.mask]
            if self._exclusion.needs_ids or documents.mean_norms is not None:
                ids = np.empty(int(starts[-1]), np.int32) if documents.has_ids else None
                rows = np.empty((len(documents.sources), int(starts[-1]), documents.row_shape[-1]), documents.dtype)
                for site in range(len(rows) if documents.mean_norms is not None else 1):
                    documents.read(site, members, rows[site], ids)
                norms = documents.norms(rows.swapaxes(0, 1) if documents.stacked else rows[0])
            positions = np.arange(starts[-1]) - starts[of_row]
            kept = self._exclusion.kept(lengths[of_row], positions, ids, norms, mask)
            counts.append(np.bincount(of_row[kept], minlength=len(members)))
        return np.concatenate(counts) if counts else np.empty(0, np.int64)

    @property
    def documents_mixed(self) -> float:
        """How many documents the rows of a full batch are of, on average over the mixes of the first epoch."""
        mixes = self._mixing.of_epoch(0)
        lengths = [self._documents.lengths[mixes.documents(number)] for number in range(len(mixes))]
        weights = [int(some.sum()) for some in lengths]
        return float(np.average([documents_mixed(some, self._batch_size) for some in lengths], weights=weights))

    def stats(self) -> ReaderStats:
        """Return what was read so far and where the time went; the object goes on counting."""
        return self._stats


class _Producer:
    """Makes the batches of a reader, in a thread that must not keep the reader alive."""

    def __init__(self, reader: RowReader, delivery: RowDelivery) -> None:
        self._delivery = delivery
        self._mixing = reader._mixing
        self._rank, self._ranks = reader._rank, reader._ranks
        self._batch_size, self._drop_last, self._forever = reader._batch_size, reader._drop_last, reader._forever
        self._beside, self._numbers, self._stats = reader._beside, reader._numbers, reader._stats
        self._count = reader.kept if reader._kept is None and reader._ranks > 1 else None
        self._kept = reader._kept
        fits = _MOST_HEAD * self._batch_size <= self._mixing.capacity
        head = self._batch_size if fits and not delivery.joins else 0
        self._mixer = Mixer(reader._documents, reader._exclusion, self._beside, delivery.buffers, head, self._stats)

    def produce(self, place: Place) -> Generator[_Item]:
        with ThreadPoolExecutor(1, thread_name_prefix="actcache-rows") as pool:
            while True:
                yield from self._epoch(place, pool)
                place = Place(place.epoch + 1)
                yield _Item(None, place)
                if not self._forever:
                    return

    def _epoch(self, place: Place, pool: ThreadPoolExecutor) -> Generator[_Item]:
        mixes = self._mixing.of_epoch(place.epoch)
        spans, sizes, before, done = self._share(place, mixes)
        filled = self._filled(mixes, spans, pool)
        parts: list[tuple[MixedRows, slice]] = []
        size, began = next(sizes, 0), done
        alone = self._ranks == 1 and not before

        def after(mix: int, row: int) -> Place:
            return Place(place.epoch, (*before, (self._ranks, done)), (mix, row) if alone else None)

        for span, mixed in filled:
            end = len(mixed) if span.end is None else span.end
            at = span.begin
            while size and at < end:
                have = sum(part.stop - part.start for _, part in parts)
                part = slice(at, min(end, at + size - have))
                parts.append((mixed, part))
                at = part.stop
                if have + at - part.start == size:
                    done += 1
                    yield self._item(parts, after(*((span.mix, at) if at < end else (span.mix + 1, 0))))
                    parts, size = [], next(sizes, 0)
            if not parts or parts[-1][0] is not mixed:
                self._delivery.done(mixed.memory)
        if parts and not self._drop_last:
            done += 1
            yield self._item(parts, after(len(mixes), 0))
        for mixed, _ in parts[-1:]:
            self._delivery.done(mixed.memory)
        if done == began and not place.dealt:
            raise UsageError("every row of these documents is left out" if not parts else "no batch is full")

    def _share(self, place: Place, mixes: Mixes) -> tuple[list[Span], Iterator[int], tuple[tuple[int, int], ...], int]:
        """Return this rank's rows, the sizes of its batches, how the epoch was dealt out before, and how many batches
        of this deal are done."""
        if self._ranks == 1 and (not place.dealt or (len(place.dealt) == 1 and place.dealt[0][0] == 1)):
            mix, begin = place.at or (0, 0)
            spans = [Span(number, begin if number == mix else 0, None) for number in range(mix, len(mixes))]
            return spans, itertools.repeat(self._batch_size), (), place.dealt[0][1] if place.dealt else 0
        if self._kept is None:
            assert self._count is not None
            self._kept = self._count()
        spans = counted(mixes.totals(self._kept))
        before, done = place.dealt, 0
        if before and before[-1][0] == self._ranks:
            before, done = before[:-1], before[-1][1]
        for ranks, rounds in before:
            spans = remaining(spans, self._deal(spans, ranks), rounds)
        deal = self._deal(spans, self._ranks)
        sizes, begin = deal.sizes(self._rank), deal.begin(self._rank)
        mine = cut(spans, begin + sum(sizes[:done]), begin + sum(sizes))
        return mine, iter(sizes[done:]), before, done

    def _deal(self, spans: Sequence[Span], ranks: int) -> Deal:
        total = sum(span.end - span.begin for span in spans if span.end is not None)
        return Deal(total, ranks, self._batch_size, self._drop_last)

    def _filled(
        self, mixes: Mixes, spans: Sequence[Span], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Span, MixedRows]]:
        """Yield the mixes of spans, one of which is filled ahead."""

        def submit(span: Span) -> Future[MixedRows]:
            return pool.submit(self._mixer.mix, mixes, span.mix)

        coming = [submit(span) for span in spans[:1]]
        try:
            for i, span in enumerate(spans):
                mixed = coming.pop().result()
                coming += [submit(following) for following in spans[i + 1 : i + 2]]
                yield span, mixed
                del mixed
        finally:
            for one in coming:
                one.cancel()

    def _item(self, parts: Sequence[tuple[MixedRows, slice]], place: Place) -> _Item:
        start = time.perf_counter()
        beside: dict[str, NDArray[Any]] = {}
        for name in self._beside:
            arrays = [mixed.beside[name][part] for mixed, part in parts]
            joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            beside[name] = joined
            if name in BESIDE:
                beside[name] = self._numbers[joined] if name == "documents" else joined.astype(np.int64)
        delivered = self._delivery.deliver(_runs(parts), beside)
        for mixed, _ in parts[:-1]:
            self._delivery.done(mixed.memory)
        self._stats.deliver_seconds += time.perf_counter() - start
        return _Item(delivered, place)


def _runs(parts: Sequence[tuple[MixedRows, slice]]) -> list[NDArray[np.generic]]:
    """Return the rows of a batch as few arrays: the end of a mix goes before the beginning of the next one."""
    runs = [mixed.values[part] for mixed, part in parts]
    if len(parts) == 2 and parts[1][1].start == 0:
        joined = parts[1][0].behind(runs[0], len(runs[1]))
        return runs if joined is None else [joined]
    return runs


def _check_alike(spaces: Sequence[OwnSource]) -> None:
    """Refuse spaces whose rows cannot stand in one array."""
    if not spaces:
        raise UsageError("give one space or more")
    shapes = {(space.recipe.hidden_size, space.recipe.dtype) for space in spaces}
    if len(shapes) > 1:
        described = ", ".join(f"{hidden} numbers of {dtype}" for hidden, dtype in sorted(shapes))
        raise ShapeError(f"rows of these spaces do not fit one array: they have {described}")


def _documents(
    spaces: Sequence[Any], wanted: NDArray[np.uint8], *, stacked: bool
) -> tuple[RowDocuments, NDArray[np.int64]]:
    """Return the documents in the order in which they lie, and their positions among ``wanted``."""
    lengths = spaces[0].lengths(wanted)
    check_present(wanted, lengths > 0)
    for number, space in enumerate(spaces[1:], 1):
        others = space.lengths(wanted)
        if not others.all():
            raise MissingEntryError(
                f"the spaces are of other documents: {int((others == 0).sum())} of {len(wanted)} are in the first one "
                f"and not in number {number}: fill both with the same, or give keys that both have",
                [wanted[int(np.argmin(others))].tobytes()],
            )
        if (others != lengths).any():
            which = int(np.argmax(others != lengths))
            raise ShapeError(
                f"the spaces are of other documents: {wanted[which].tobytes().hex()} has {int(lengths[which])} rows in "
                f"the first one and {int(others[which])} in number {number}"
            )
    order = spaces[0].order_of(wanted)
    has_ids = all(bool(space.has(TOKEN_IDS, wanted).all()) for space in spaces)
    return RowDocuments(spaces, stacked, np.ascontiguousarray(wanted[order]), lengths[order], has_ids), order
