"""Several sites of one model, recorded in one pass: to learn which layer suits a task, or to read all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.format.keys import Document
from actcache.models import cluster, error_budget
from actcache.models.agreement import when_opened
from actcache.models.documents import ColumnFields, Field, documents_in, documents_with_columns, listed
from actcache.models.families import base_model_of, family_of
from actcache.models.filling import Filler, FillReport
from actcache.models.late_store import LateStore
from actcache.models.lower_half import TOKEN_BUDGET, LowerHalf
from actcache.models.partition import Partition
from actcache.models.pretrained import load_pretrained
from actcache.models.recycler import Recycler
from actcache.models.remote import Blueprint, blueprint_of
from actcache.models.sites import Site, expanded, several
from actcache.models.weights import lower_digests
from actcache.reader.rows import RowReader
from actcache.store.store import Store


class Recyclers(Mapping[int | str, Recycler]):
    """The recyclers of one model by site; each site is a space of its own. Not thread-safe.

    Keys are the layers and sites as they were given; two that are one place have one recycler. A space that was filled
    this way is the one that a ``Recycler`` of that site finds, and the other way round.

    Args:
        layers: in any order; a list, range or array of numbers, ``"last"`` among them perhaps, or ``"all"`` for 0..N.
        sites: paths of modules, as ``Recycler`` takes them.
        store: a ``Store``, or a URL or path of one, which this then opens and closes.
        options: the other arguments of ``Recycler``.

    Attributes:
        filler: fills all of them; for ``actcache.models.parallel``.

    Raises:
        UsageError: there are neither layers nor sites, or one twice. Else as ``Recycler``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layers: Sequence[int | str] | str = (),
        sites: Sequence[str] = (),
        store: Store | str | Path,
        **options: Any,
    ) -> None:
        given = several(layers, sites)
        base = base_model_of(model)
        family = family_of(base)
        places = {str(where) if isinstance(where, Site) else where: where for where in expanded(base, family, given)}
        found = {name: LowerHalf(base, family, where).site for name, where in places.items()}
        digests = lower_digests(base, family, list(found.values()))
        self._made_by: dict[str, Any] = {
            "layers": list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers
        }
        self._made_by |= {"sites": list(sites)}
        self._made_by |= options
        self._base = base
        self._late = LateStore.of(store)
        self._late.digests = digests
        made: dict[Site, Recycler] = {}
        self._recyclers: dict[int | str, Recycler] = {}
        try:
            for name, site in found.items():
                if site not in made:
                    place: dict[str, Any] = {"layer": site.layer} if site.layer is not None else {"site": str(site)}
                    shared: dict[str, Any] = {"store": self._late}
                    made[site] = Recycler(model, tokenizer, **place, **shared, **options)
                    self._late.first = ()  # what can be stored at one site can be at all
                self._recyclers[name] = made[site]
            agreements = [recycler.agreement for recycler in made.values()]
            when_opened(agreements)
        except BaseException:
            for recycler in made.values():
                recycler.close()
            self.close()
            raise
        self.filler = Filler(self._late.open(), agreements)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layers: Sequence[int | str] | str = (),
        sites: Sequence[str] = (),
        store: Store | str | Path,
        device: str | torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Recyclers:
        """Load base model and tokenizer, and return their recyclers; see ``Recycler.from_pretrained``."""
        model, tokenizer = load_pretrained(
            name_or_path, several(layers, sites), device, revision, trust_remote_code=trust_remote_code
        )
        made = cls(model, tokenizer, layers=layers, sites=sites, store=store, **options)
        made._made_by |= {"revision": revision, "trust_remote_code": trust_remote_code}
        return made

    def fill(
        self,
        texts: Iterable[Document],
        *,
        field: Field | None = None,
        columns: ColumnFields | None = None,
        token_budget: int = TOKEN_BUDGET,
        progress: bool = True,
        max_bytes: int | str | None = None,
        max_error: float | None = None,
        metric: str = "rows",
        partition: str | tuple[int, int] | Partition | None = None,
    ) -> FillReport:
        """Compute each document once, as far as the deepest site that lacks it, and store it at each site that does.

        Else as ``Recycler.fill``; ``computed`` counts the documents that any site lacked, and ``max_bytes`` is for all
        sites together; ``max_error`` is for each of them.
        """
        self._late.open().check_writable()
        share = None if partition is None else Partition.parse(partition)
        own = None if columns is None else documents_with_columns(texts, field, columns)
        documents = self.filler.looked_over(documents_in(texts, field) if own is None else own, share)
        documents = self.measured(documents, max_error, metric)
        return self.filler.fill(documents, token_budget, progress, max_bytes, own, share)

    def fill_ray(
        self,
        texts: Iterable[Document],
        *,
        field: Field | None = None,
        columns: ColumnFields | None = None,
        address: str | None = None,
        **options: Any,
    ) -> FillReport:
        """Fill all sites by the workers of a Ray cluster, in one pass; else as ``Recycler.fill_ray``."""
        return cluster.fill_spaces(self.blueprint, self.filler, texts, field, columns, address=address, **options)

    def blueprint(self) -> Blueprint:
        """Return what makes these recyclers in another process; see ``Recycler.blueprint``."""
        return blueprint_of(type(self).from_pretrained, self._base, self._late.open(), self._made_by, self.filler)

    def missing(self, texts: Iterable[Document], *, field: Field | None = None) -> list[int]:
        """Return the positions of the documents that any of the sites lacks; else as ``Recycler.missing``."""
        return self.filler.missing(documents_in(texts, field))

    def measured(self, texts: Iterable[Document], max_error: float | None, metric: str) -> Iterable[Document]:
        """Measure what storing does, as ``fill`` does before it stores anything; return all of the documents.

        Raises:
            ErrorBudgetError, UsageError: see ``Recycler.fill``.
        """
        agreements = [recycler.agreement for recycler in dict.fromkeys(self._recyclers.values())]
        return error_budget.measured(texts, agreements, max_error, metric)

    def rows(self, texts: Iterable[Document] | None = None, *, device: Any = "cpu", **options: Any) -> RowReader:
        """Return batches of rows ``[n, layers, hidden]``, mixed across documents and aligned row by row, the layers in
        the order in which they were given; else as ``Recycler.rows``.

        ``MissingEntryError``, ``ShapeError``: layers hold other documents than the first one.
        """
        given = None if texts is None else listed(texts)
        told = [recycler.row_keys(given) for recycler in self._recyclers.values()]
        return RowReader([recycler.space for recycler in self._recyclers.values()], **told[0], device=device, **options)

    def pooled(self, texts: Iterable[Document] | None = None, how: Any = "mean") -> NDArray[np.float32]:
        """Return one row a document and layer, ``[documents, layers, hidden]`` float32, the layers in their order here;
        else as ``Recycler.pooled``.

        ``MissingEntryError``: a layer lacks a document of the first one.
        """
        given = None if texts is None else listed(texts)
        if given is not None:
            return np.stack([recycler.pooled(given, how) for recycler in self._recyclers.values()], axis=1)
        keys = next(iter(self._recyclers.values())).space.key_array()
        return np.stack([recycler.space.pooled(keys, how) for recycler in self._recyclers.values()], axis=1)

    def close(self) -> None:
        """Close all spaces, and the store where this opened it. Does nothing the second time."""
        with ExitStack() as stack:  # all of them, also where one fails
            stack.callback(self._late.close)
            for recycler in self._recyclers.values():
                stack.callback(recycler.close)

    def __getitem__(self, where: int | str) -> Recycler:
        return self._recyclers[where]

    def __iter__(self) -> Iterator[int | str]:
        return iter(self._recyclers)

    def __len__(self) -> int:
        return len(self._recyclers)

    def __enter__(self) -> Recyclers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Recyclers of {', '.join(map(str, self))}>"
