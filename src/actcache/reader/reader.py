"""The reader: batches of entries, epoch after epoch, read ahead by a thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from actcache.errors import ShapeError, UsageError
from actcache.format import codec
from actcache.format.arguments import check_choice, dtype_name, nbytes_of, whole, whole_numbers
from actcache.format.keys import Keys, key_array
from actcache.reader.caches.local_cache import LocalCache
from actcache.reader.caches.ram_cache import RamCache
from actcache.reader.checks import check_own, check_present, ranks_of
from actcache.reader.cursor import Cursor
from actcache.reader.delivery import Delivery, HostDelivery
from actcache.reader.epoch import Epoch, MissComputer, Work, count_spent
from actcache.reader.fetch import EntryInfo, OwnSource, Source
from actcache.reader.labels import labels_of
from actcache.reader.order import Order
from actcache.reader.stats import ReaderStats

if TYPE_CHECKING:
    from actcache.reader.dataset import BatchDataset, EntryDataset


class Reader:
    """Iterates over the entries of keys in batches; each iteration is one epoch, and the next has the next order.

    A thread reads ``depth`` batches ahead. Several readers of one space, and several iterations of one reader, are
    fine; one thread at a time per iteration. An iteration that is broken off, closed or collected leaves no thread.
    Batches may be kept: their memory is used again only when nothing refers to it. The reader holds memory for
    ``depth + 4`` batches for as long as it lives.

    Args:
        keys: of the documents, in the given order; a key may stand more than once.
        batch_size: documents of a batch, at most.
        max_tokens: tokens of a batch as it is padded, at most; a longer document is alone.
        shuffle: whether each epoch has a random order, decided by ``seed`` and the number of the epoch.
        bucket: whether documents of like length share a batch, for less padding; with ``shuffle`` still at random.
        drop_last: whether to leave out an epoch's last batch where it is not full.
        equal_lengths: whether documents of different lengths share no batch, for models that know no padding. Batches
            that are not full come last.
        labels: one label a key (numbers, or arrays of one shape), or a list of one array a key, with one number a token
            (padded with -100, or packed like the rows). Whole numbers and truth values are delivered as int64.
        columns: names of columns of the caller's own that are delivered as ``Batch.columns``; every document has them.
            Not with the two caches.
        documents: one position a key, delivered as ``Batch.documents``; the key's own position by default.
        layout: ``"padded"`` (``Batch``) or ``"packed"`` (``PackedBatch``).
        device: a torch device for the batches; None for NumPy arrays.
        dtype: of the activations as they are delivered: ``float32``, ``float16`` or ``bfloat16`` (which takes a
            device); None for the one that they are stored in, where that is one of these, else ``float32``.
        on_missing: ``"raise"`` or ``"skip"`` documents that are absent when the reader is made; a recycler's reader
            can also ``"compute"`` them. One that is deleted later is a ``MissingEntryError`` when its turn comes.
        depth: batches that are read ahead; 0 reads each when it is asked for, without a thread.
        ram_cache: bytes of activations (``"8GiB"``, or a number) that are kept in memory, those that are read first:
            later epochs do not read them again. What is overwritten in the space meanwhile is not noticed.
        local_cache: a folder of a local disk where copies of what is read from a remote store are kept, for later
            epochs, runs and other processes; see docs/reader.md.
        local_bytes: that this folder may take up (``"200GiB"``, or a number); evicted is what nobody uses.
        ranks: ``(rank, how many there are)``: this reader delivers its share of each round of batches. Those of
            ``torch.distributed`` by default, where it is initialized.
        on_stats: called with a copy of the statistics when the consumer has finished with a batch and at the end of an
            epoch, by the consumer's thread, which its exceptions reach; for export (``ReaderStats.metrics``).
        miss_computer: computes what is missing, for ``"compute"``; ``Recycler.reader`` brings one.

    Raises:
        MissingEntryError: entries are absent; it names them.
        ShapeError, UsageError: an option does not fit.
    """

    _local: LocalCache | None = None

    def __init__(
        self,
        space: Source,
        keys: Keys,
        *,
        batch_size: int = 32,
        max_tokens: int | None = None,
        shuffle: bool = False,
        bucket: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        equal_lengths: bool = False,
        labels: Any = None,
        columns: Sequence[str] = (),
        documents: Any = None,
        layout: str = "padded",
        device: Any = None,
        dtype: str | None = None,
        on_missing: str = "raise",
        depth: int = 2,
        ram_cache: int | str = 0,
        local_cache: str | os.PathLike[str] | None = None,
        local_bytes: int | str = 0,
        ranks: tuple[int, int] | None = None,
        on_stats: Callable[[ReaderStats], object] | None = None,
        miss_computer: MissComputer | None = None,
    ) -> None:
        depth = whole("depth", depth, 0)
        self._order = Order(batch_size, max_tokens, shuffle, bucket, seed, drop_last, equal_lengths)
        check_choice("layout", layout, ("padded", "packed"))
        if dtype is not None:
            dtype = dtype_name(dtype)
            check_choice("dtype", dtype, codec.FLOATS)
            if dtype == "bfloat16" and device is None:
                raise UsageError("NumPy has no bfloat16: name a device ('cpu'), or ask for float32")
        check_choice("on_missing", on_missing, ("raise", "skip", "compute") if miss_computer else ("raise", "skip"))
        wanted = key_array(keys)
        own = (columns,) if isinstance(columns, str) else tuple(columns)
        if own:
            if ram_cache or local_cache is not None or on_missing == "compute":
                raise UsageError("columns come with neither ram_cache, local_cache nor on_missing='compute'")
            check_own(cast(OwnSource, space), wanted, own, tensors=device is not None)
        stats = ReaderStats()
        if local_bytes and local_cache is None:
            raise UsageError("local_bytes bounds a local cache: name its folder, too, as local_cache")
        if local_cache is not None:
            space = self._local = LocalCache(space, local_cache, nbytes_of("local_bytes", local_bytes), stats)
            self._local.use(wanted)
        if ram_cache:
            space = RamCache(space, nbytes_of("ram_cache", ram_cache), stats)
        positions = np.arange(len(wanted)) if documents is None else whole_numbers("documents", documents)
        if positions.shape != (len(wanted),):
            raise ShapeError(f"{len(wanted)} keys and documents of shape {list(positions.shape)}: give each a position")
        info = EntryInfo.of(space, wanted)
        lengths = info.lengths.copy()
        wanted_labels = None if labels is None else labels_of(labels, lengths)
        found = lengths > 0
        if on_missing == "raise":
            check_present(wanted, found)
        elif on_missing == "compute":
            if not found.all() and (bucket or max_tokens or equal_lengths):
                assert miss_computer is not None
                lengths[~found] = miss_computer.lengths(np.flatnonzero(~found))
            found[:] = True
        self._work = Work(
            space,
            wanted[found],
            positions[found],
            None if wanted_labels is None else wanted_labels[found],
            np.flatnonzero(found),
            info[found],
            depth=depth,
            miss_computer=miss_computer if on_missing == "compute" else None,
            stats=stats,
            columns=own,
        )
        self._layout, self._device, self._dtype, self._on_stats = layout, device, dtype, on_stats
        self._delivery: tuple[int, Delivery] | None = None
        self._digest = self._order.digest(self._work.keys, lengths[found])
        rank, world = ranks_of(ranks, self._digest)
        if self._order.equal_lengths and world > 1 and not drop_last and len(set(lengths[found].tolist())) > 1:
            raise UsageError(
                "documents of several lengths cannot be dealt out evenly to several ranks in batches of one length: "
                "give drop_last=True"
            )
        self._cursor = Cursor(self._order, lengths[found], rank, world)

    def __len__(self) -> int:
        """Return the number of batches that a whole epoch has on this rank (with ``max_tokens``, the coming one)."""
        return self._cursor.batches_of_epoch()

    def __iter__(self) -> Epoch:
        return Epoch(self._work, self._to_device(), self._cursor, self._on_stats)

    def _to_device(self) -> Delivery:
        """Return the way to the device, whose buffers all iterations share; made anew in a fork's child."""
        if self._delivery is None or self._delivery[0] != os.getpid():
            stored, packed = self._work.source.recipe.dtype, self._layout == "packed"
            options: dict[str, Any] = {"packed": packed, "depth": self._work.depth, "deliver": self._dtype}
            self._delivery = os.getpid(), _delivery(stored, self._device, **options)
        return self._delivery[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_delivery": None, "_on_stats": None}  # what travels is where to read, never buffers

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; where that is the one that was loaded, it goes on where that was."""
        self._cursor.set_epoch(whole("epoch", epoch, 0))

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for what it can tell the epoch: ``batch_sampler.sampler`` is the reader."""
        return SimpleNamespace(sampler=self)

    def dataset(self) -> EntryDataset:
        """Return the reader's documents as a map-style data set, for a ``DataLoader`` or the ``Trainer``."""
        from actcache.reader.dataset import EntryDataset

        return EntryDataset(self._work)

    def batches(self) -> BatchDataset:
        """Return the reader's batches as an iterable data set of torch, which loaders and trainers tell by its type."""
        from actcache.reader.dataset import BatchDataset

        return BatchDataset(self)

    def stats(self) -> ReaderStats:
        """Return what was read so far and where the time went; the object goes on counting."""
        if self._delivery is not None and self._delivery[0] == os.getpid():
            count_spent(self._work.stats, self._delivery[1])  # copies that have ended since the last batch was read
        return self._work.stats

    def close(self) -> None:
        """Write to the local cache what waits to be written, and let others evict what it holds.

        Without one there is nothing to do. A reader that is collected does the same, and so does the end of a process;
        a reader that was closed reads on without a local cache. Does nothing the second time.
        """
        if self._local is not None:
            self._local.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def digest(self) -> str:
        """Return what identifies the order of this reader's epochs, on all ranks: its keys and options."""
        return self._digest

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration that was begun or advanced last is: after the batch that it returned last. The
        same on all ranks; another number of ranks can go on from it."""
        epoch, consumed = self._cursor.reached
        return {"epoch": epoch, "consumed": consumed, "order": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next iteration go on at a state; ``UsageError`` where it is of a reader with other keys or another
        order."""
        try:
            epoch, consumed, order = int(state["epoch"]), int(state["consumed"]), state["order"]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"this is no state of a reader: {error!r}") from None
        if order != self._digest or epoch < 0 or not 0 <= consumed <= len(self._work.keys):
            raise UsageError("the state is of a reader with other keys, batch sizes or another order; start it anew")
        self._cursor.load(epoch, consumed)


def _delivery(dtype: str, device: Any, **options: Any) -> Delivery:
    """Return the delivery to a device; None for NumPy arrays."""
    if device is None:
        return HostDelivery(dtype, None, **options)
    import torch  # only those who name a device need it

    device = torch.device(device)
    if device.type == "cpu":
        return HostDelivery(dtype, torch, **options)
    from actcache.reader.accelerator import AcceleratorDelivery
    from actcache.reader.streams import async_device

    return AcceleratorDelivery(dtype, async_device(device), **options)
