"""The recycler: one pretrained model, one site in it, and the space where its activations are kept."""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actcache.errors import DataError, UnsupportedModelError, UsageError, VerificationError
from actcache.format.keys import Document, Windows, key_list
from actcache.format.media import By
from actcache.format.passages import Passages
from actcache.format.ragged import EXTRAS
from actcache.format.recipe import Recipe
from actcache.models import cluster, consumers, error_budget, loading, proof, replay, verification
from actcache.models.after_encoder import starts_at
from actcache.models.agreement import Agreement
from actcache.models.canary import Encoder
from actcache.models.chats import Chats, encode_chats
from actcache.models.compute_on_miss import ComputeOnMiss
from actcache.models.documents import ColumnFields, Field, documents_in, documents_with_columns, listed
from actcache.models.error_budget import Choice
from actcache.models.families import Family, base_model_of, family_of
from actcache.models.filling import Filler, FillReport
from actcache.models.late_store import LateStore
from actcache.models.lower_half import TOKEN_BUDGET, LowerHalf
from actcache.models.modes import evaluating
from actcache.models.partial_vocabulary import vocabulary_size
from actcache.models.partition import Partition
from actcache.models.passages import (
    Outline,
    Revision,
    check_outline_found,
    check_revised,
    compare,
    labels_of_passages,
    outline_of,
)
from actcache.models.pretrained import load_pretrained
from actcache.models.processing import Made, MediaEncoder, processor_of, takes_features
from actcache.models.provenance import origin, revision_of, setup_of
from actcache.models.remote import Blueprint, blueprint_of
from actcache.models.sites import chosen
from actcache.models.tokenizing import DocumentEncoder, Passage, TooLong, check_max_length
from actcache.models.training import regimes
from actcache.models.training.regimes import Prepared, Regime
from actcache.models.verification import Verification
from actcache.models.weights import check_same_lower_half, lower_digest
from actcache.reader.labels import of_entries
from actcache.reader.order import Order
from actcache.reader.reader import Reader
from actcache.reader.rows import RowReader
from actcache.store.document_entries import check_found, find_entries
from actcache.store.store import Store
from actcache.store.stored_errors import StoredErrors

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)


_POLICIES: dict[type[Any], str] = {Windows: "windows", Passages: "passages"}


class Recycler:
    """Records the activations of a model at one site, and serves them to reduced models. Not thread-safe.

    Args:
        model: a base or task model of transformers, in eval mode; used as it is, never changed.
        tokenizer: the model's tokenizer; where its documents are images or audio, its image processor or feature
            extractor (docs/documents.md); or a processor that has it. Used as it is, never changed.
        layer: record the output of this layer: 1..N, 0 for what goes into layer 1, a negative number to count from the
            end, ``"last"`` for what comes after the final norm. Reduced models start from the output of 1..N-1.
        site: in the place of ``layer``, record what a module gives, or with ``:input`` at the end is given, by its path
            from the base model: ``"layers.5.mlp"``, ``"layers.5.mlp:input"`` (docs/sites.md).
        store: a ``Store``, or a URL or path of one, which the recycler then opens and closes.
        dtype: how rows are stored: ``float16``, ``float32`` or ``bfloat16``; None for the family's own, which is
            ``bfloat16`` for T5, Llama, Qwen and Gemma, whose activations overflow ``float16``, and else ``float16``.
        compute_dtype: what the lower half computes in, where that is not its parameters' dtype: ``bfloat16``,
            ``float16`` (by autocast).
        max_length: tokens that a document may have, special tokens included; by default what model and tokenizer allow.
        too_long: what becomes of longer documents: ``"refuse"`` them, ``"truncate"`` them, cut all into
            ``"windows"``, which ``actcache.windows(max_length, stride)`` says in more detail, or, where their content
            says so, into ``actcache.passages(max_length)``, which revisions and other documents share
            (docs/passages.md).
        special_tokens: whether texts get the tokenizer's special tokens.
        key_by: what the keys of images and audio are made from: ``"content"``, what is decoded, or ``"bytes"``, the
            bytes of their files. ``actcache.Image`` and ``actcache.Audio`` say it for themselves.
        extras: of ``spans``, ``word_ids``, ``type_ids``, what is stored beside the token ids.
        provenance: the caller's own notes, recorded with a space that this creates.
        check_canaries: whether the space's canaries (five small documents) are computed and compared here and before
            each fill, reader and reduced model. Hooks, adapters' scales and numbers that were changed on a module show
            nowhere else: without the check their numbers are taken for the stored ones.

    Attributes:
        recipe: what decides the numbers.
        space: where they are; one that is absent comes to be with the first documents that are stored.
        agreement: of the space with the tokenizer and the lower half that compute its entries.

    Raises:
        LayerError, RecipeError, UnsupportedModelError, ModelError: model and options do not fit.
        CanaryError: the space's canary documents come out differently with this model here.
        StoreError: the store cannot be opened, or is read-only and has no such space.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        layer: int | str | None = None,
        site: str | None = None,
        store: Store | str | Path,
        dtype: str | None = None,
        compute_dtype: str | None = None,
        max_length: int | None = None,
        too_long: TooLong = "refuse",
        special_tokens: bool = True,
        extras: Sequence[str] = (),
        key_by: By = "content",
        provenance: Mapping[str, str] | None = None,
        check_canaries: bool = True,
    ) -> None:
        late = LateStore.of(store)
        base = base_model_of(model)
        family = family_of(base)
        self._made_by: dict[str, Any] = {"layer": layer, "site": site, "dtype": dtype, "compute_dtype": compute_dtype}
        self._made_by |= {"max_length": max_length, "too_long": too_long, "special_tokens": special_tokens}
        self._made_by |= {"extras": tuple(extras), "key_by": key_by, "provenance": provenance}
        self._made_by |= {"check_canaries": check_canaries}
        lower = LowerHalf(base, family, chosen(layer, site), compute_dtype)
        encoder: Encoder
        if takes_features(base):
            _check_of_texts(max_length=max_length, extras=tuple(extras), special_tokens=special_tokens)
            with evaluating(base):
                encoder = MediaEncoder(tokenizer, base, lower.count_rows, key_by=key_by, too_long=too_long)
        else:
            if key_by != "content":
                raise UsageError("key_by is for images and audio: a text's key is of its characters")
            encoder = DocumentEncoder(
                processor_of(tokenizer, base),
                check_max_length(max_length, processor_of(tokenizer, base), family.max_tokens(base.config)),
                too_long,
                special_tokens,
                vocabulary=vocabulary_size(base),
                extras=_check_extras(extras),
            )
        lower.family = family = proof.of_rows(lower, encoder.max_length, late.digests or ())
        self.recipe = Recipe(
            model=str(base.config.name_or_path or type(base).__name__),
            layer=lower.site.layer,
            site=str(lower.site) if lower.site.layer is None else None,
            hidden_size=lower.hidden_size,
            dtype=dtype or family.dtype,
            weights=late.digests[lower.site] if late.digests else lower_digest(base, family, lower.site),
            config=family.numbers_of(base.config),
            compute_dtype=lower.compute_dtype,
            tokenizer=encoder.digest(),
            special_tokens=encoder.special_tokens,
            max_length=encoder.max_length,
            too_long=encoder.too_long if isinstance(encoder.too_long, str) else _POLICIES[type(encoder.too_long)],
            provenance={**setup_of(lower), **revision_of(base), **origin(), **(provenance or {})},
        )
        if late.first:
            encoder.encode(late.first)
        self._store = late.open()
        self._owns_store = late.owned and late.digests is None
        try:
            self.space = self._store.space(self.recipe, late=True)
            self.agreement = Agreement(self.space, encoder, lower, enabled=bool(check_canaries))
            self.filler = Filler(self._store, [self.agreement])
            if late.digests is None:
                self.agreement.when_opened()
        except BaseException:
            self.close()
            raise
        if self.space.created:
            self._log_nearest()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layer: int | str | None = None,
        site: str | None = None,
        store: Store | str | Path,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Recycler:
        """Load base model and tokenizer (or raise ``ModelError``), and return their recycler.

        Several layers or sites at once are for ``Recyclers.from_pretrained(..., layers=..., sites=...)``.

        Args:
            device: where the lower half runs; None for a CUDA device where there is one, else the CPU.
            revision: of the model on the hub.
            trust_remote_code: run the code that a model brings with it; it is part of the space's identity. Without the
                word a model that needs its own code is refused.
            options: the other arguments of ``Recycler``.
        """
        if several := [name for name in ("layers", "sites") if name in options]:
            given = f"{several[0]}={options[several[0]]!r:.80}"
            raise UsageError(
                f"{several[0]} are for actcache.Recyclers.from_pretrained(..., {given}): one pass records all of them, "
                "each in a space of its own. A Recycler has one layer= or site="
            )
        model, tokenizer = load_pretrained(
            name_or_path, [chosen(layer, site)], device, revision, trust_remote_code=trust_remote_code
        )
        made = cls(model, tokenizer, layer=layer, site=site, store=store, dtype=dtype, **options)
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
        """Compute and store the documents that are not in the space; durable when it returns.

        A fill that was interrupted (Ctrl-C) or killed goes on where it was when it is called again: what is stored is
        skipped. An interrupt loses nothing, a kill what was computed in the last minute (docs/reliability.md). All
        windows of a document are stored together.

        Args:
            texts: any iterable of documents; it is streamed. Of a table give a column: ``frame["text"]``, or
            field: the name of the column (two for pairs) of a data set of Hugging Face, a table of pandas, Polars or
                Arrow, or rows that are mappings: ``fill(dataset, field="text")``.
            columns: fields of the data set that have a value a token, special tokens included: their names, or a
                mapping of columns to them. They are stored as columns of the caller's own with what is computed now; a
                document must not be cut into windows.
            token_budget: padded tokens of a batch. Documents of similar length are computed together.
            progress: whether to show a bar (a line now and then where stderr is no terminal).
            max_bytes: that the space takes on the medium at most, what was there before included: a number or a size
                like ``"200GiB"``. From the first document on that does not fit, all that are missing are left out.
            max_error: relative error that storing may make, measured on the first documents before anything is stored.
                Without it a codec that scales rows (``int8``, ``float8_e4m3``) is measured all the same, once, and what
                was found is kept with the space (``measured``).
            metric: of what: ``rows``, or ``hidden``, the final hidden states.
            partition: fill this share of the documents alone, such as ``(3, 8)`` or ``"3/8"``: processes that are given
                the same documents and each another of the shares 0/8 to 7/8 compute each document once, on as many
                machines as one likes. The reports add up (``sum`` with ``start``, or ``+``).

        Raises:
            UsageError: ``texts`` are none: one text, a table, a file, ..., or an iterator that gives nothing.
            DocumentError, DocumentTooLongError: a document cannot be stored, or a column has not one value a token; it
                names its position.
            NonFiniteError, CodecOverflowError: a document's rows do not fit the stored dtype; it names its position.
            LowerHalfMismatchError: the model's lower half was trained since the recycler was made.
            ModelError: the model is in train mode.
            ErrorBudgetError: storing changes ``metric`` by more than ``max_error``.
            CanaryError: the lower half computes other numbers than those of the space (a hook, an adapter, ...).
            StoreError: read-only, disk full, ...; what was stored before stays.
        """
        self._store.check_writable()
        share = None if partition is None else Partition.parse(partition)
        own = None if columns is None else documents_with_columns(texts, field, columns)
        documents = self.filler.looked_over(documents_in(texts, field) if own is None else own, share)
        documents = error_budget.measured(documents, [self.agreement], max_error, metric)
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
        """Fill the space by the workers of a Ray cluster; durable when it returns. Needs ``actcache[ray]``.

        Each worker is an actor with the lower half alone, which is loaded there (see ``blueprint``), and writes
        segments of its own into the store, which all nodes must see. Documents are read here, once, and partitioned by
        their keys, so that no two workers compute the same one; what is in the space is skipped before anything is
        computed. A worker that dies has another one started in its place, which is given what was not stored. Where
        this process dies, or too many workers, what was flushed stays: call it again to go on.

        Args:
            texts, field, columns: see ``fill``; also a ``ray.data.Dataset``, whose rows come batch by batch. Images and
                audio that are given as paths (absolute ones) are read by the workers, too, which must see them there.
            address: of the cluster, as ``ray.init`` takes it (``"auto"``, ``"host:6379"``, ``"ray://host:10001"``);
                ``"local"`` starts one here. None for ``RAY_ADDRESS``, or one that runs here, or else a new one. Where
                Ray is initialized already, by a data set of its own for instance, that is used.
            options: ``workers`` (default: one a GPU; where there is none, one a node), ``cpus`` and ``gpus`` of each,
                ``device`` in each (``"cpu"`` also where there are GPUs); ``token_budget``, ``progress``, ``max_error``,
                ``metric`` as of ``fill``; ``deaths`` that are borne, of workers of one share one after another, none of
                which stored anything (3); ``start_seconds`` within which they must have started (600);
                ``finish``: whether ``Space.finish`` is called in the end (True); ``ray_options``: of the actors, such
                as ``{"runtime_env": {...}, "accelerator_type": "H100"}``.

        Returns:
            A report whose ``contributions`` say what each worker has stored, as it stands in the store.

        Raises:
            MissingExtraError: Ray is not installed.
            UsageError: the texts are none, or paths; ``max_bytes`` and ``partition``, which are of ``fill`` alone; see
                ``fill`` and ``blueprint``.
            WorkerError: there is no cluster; torch finds no GPU where Ray gives one; workers do not start, or died too
                often, or failed with an error that is none of this package's.
            StoreGoneError: a worker does not see the store, or another one at its place (a folder of another machine).
            ActcacheError: a worker failed with this; see ``fill``.
        """
        return cluster.fill_spaces(self.blueprint, self.filler, texts, field, columns, address=address, **options)

    def blueprint(self) -> Blueprint:
        """Return what makes this recycler in another process: it names the model, and is small when pickled.

        Raises:
            UsageError: the model was made in memory, and is not known by a name or folder.
        """
        return blueprint_of(
            type(self).from_pretrained, self.agreement.lower.base_model, self._store, self._made_by, self.filler
        )

    def missing(self, texts: Iterable[Document], *, field: Field | None = None) -> list[int]:
        """Return the positions of the documents that are not wholly in the space, windows included: what ``fill``
        would compute. Of a document that is given twice, the first is named. Looked up in bulk; nothing is computed.

        Args:
            texts, field: see ``fill``; streamed, a number a missing document is held.

        Raises:
            UsageError, DocumentError: see ``fill``.
        """
        return self.filler.missing(documents_in(texts, field))

    @property
    def measured(self) -> StoredErrors | None:
        """What storing does to the numbers, as it was measured when the space was filled; None where it was not."""
        return StoredErrors.read(self.space)

    def measure(
        self,
        texts: Iterable[Document],
        *,
        field: Field | None = None,
        task_model: PreTrainedModel | None = None,
        sample: int = error_budget.SAMPLE,
    ) -> StoredErrors:
        """Measure on the first documents what storing does to rows, to the final hidden states, and to the outputs of a
        task model where one is given; keep that with the space, and return it.

        Raises:
            UsageError: there are no documents.
            NonFiniteError, CodecOverflowError: rows do not fit the stored dtype.
            LowerHalfMismatchError: the task model's lower half is not the one that was recorded.
        """
        if task_model is not None:
            check_same_lower_half(task_model, self.recipe)
        lower, encoder = self.agreement.lower, self.agreement.encoder
        texts = documents_in(texts, field)
        meter = error_budget.ErrorMeter(lower, encoder, texts, task_model=task_model, sample=sample)
        found = meter.measure(self.recipe.dtype, self.recipe.via)
        found.write(self.space)
        return found

    def choose(
        self,
        texts: Iterable[Document],
        *,
        max_error: float,
        metric: str = "hidden",
        layers: Sequence[int | str] | None = None,
        dtypes: Sequence[str] = error_budget.CANDIDATES,
        field: Field | None = None,
        task_model: PreTrainedModel | None = None,
        sample: int = error_budget.SAMPLE,
    ) -> Choice:
        """Try codecs, and layers, on a sample; return the cheapest within a budget: that of the fewest bytes, and of
        layers with as many the highest, which leaves the least to run. Nothing is stored.

        What a higher layer takes from a task that is trained above it, no sample of texts says: name the ``layers``
        that suit the task (``actcache.models.training`` compares them).

        Args:
            texts: the first of them are the sample.
            max_error: relative error that storing may make.
            metric: of what: ``rows``, ``hidden`` (the final hidden states), or ``logits`` (of a ``task_model``).
            layers: to try; None for this recycler's.
            dtypes: codecs to try.

        Raises:
            ErrorBudgetError: none of them is within the budget.
            UsageError: there are no documents, or the metric cannot be measured.
            LayerError, RecipeError: there is no such layer, or codec.
        """
        if task_model is not None:
            check_same_lower_half(task_model, self.recipe)
        own, encoder = self.agreement.lower, self.agreement.encoder
        some = list(itertools.islice(documents_in(texts, field), sample))
        meters: dict[int | str, error_budget.ErrorMeter] = {}
        for layer in layers or [own.site.name]:
            lower = own if layer == own.site.name else LowerHalf(own.base_model, own.family, layer, own.compute_dtype)
            meters[layer] = error_budget.ErrorMeter(lower, encoder, some, task_model=task_model, sample=sample)
        return error_budget.choose(meters, dtypes, max_error=max_error, metric=metric)

    def reader(
        self,
        texts: Iterable[Document],
        *,
        field: Field | None = None,
        labels: Any = None,
        batch_size: int = 32,
        device: Any = "cpu",
        on_missing: str = "raise",
        **options: Any,
    ) -> Reader:
        """Return a reader of these documents' entries; see ``actcache.Reader`` for the other options.

        Where documents are cut into windows, each window is an entry of the batches: it has its document's label, and
        ``Batch.documents`` says whose it is, as a position in ``texts``. Images and audio that make different numbers
        of rows share no batch, for their models have no padding (``equal_lengths``).

        Args:
            field: of a data set or table, as ``fill`` takes it.
            on_missing: ``"compute"`` computes and stores the missing documents of each batch when its turn comes (and
                those that are corrupt), and delivers them as they are stored: the first epoch fills, later ones replay,
                and both see the same numbers. They are durable at the end of the epoch, and when a minute old.

        Raises:
            MissingEntryError: documents are not (or, of windows, not wholly) in the space.
            LowerHalfMismatchError, CanaryError, UsageError: see ``fill``.
            ReadOnlyError: ``"compute"`` with a store that was opened read-only.
        """
        documents_given = listed(documents_in(texts, field))
        options |= {"batch_size": batch_size, "device": device}
        if (cut := self._outline(documents_given)) is not None:
            return self._passages_reader(documents_given, *cut, labels, on_missing, options)
        keys = self.agreement.encoder.keys(documents_given)
        self.agreement.before_serving(keys)
        if not self.agreement.encoder.has_token_ids and options.get("layout") != "packed":
            options.setdefault("equal_lengths", True)
        if on_missing == "compute":
            self._store.check_writable()
            misses = ComputeOnMiss(self.space, self.filler, self.agreement.encoder, documents_given, keys)
            return misses.reader(labels, **options)
        found = find_entries(self.space, keys, self.agreement.encoder.windows)
        if on_missing == "raise":
            check_found(keys, found)
        documents = np.repeat(np.arange(len(keys)), [len(entries) for entries in found])
        return self.space.reader(
            list(itertools.chain.from_iterable(found)),
            labels=None if labels is None else of_entries(labels, documents, len(keys)),
            documents=documents,
            on_missing=on_missing,
            **options,
        )

    def _outline(self, texts: Iterable[Document]) -> tuple[Outline, DocumentEncoder] | None:
        """Return the documents' passages, and what cuts them; None where they are not cut so."""
        encoder = self.agreement.encoder
        if not isinstance(encoder, DocumentEncoder) or encoder.passages is None:
            return None
        return outline_of(encoder, texts), encoder

    def _passages_reader(
        self,
        texts: list[Document],
        outline: Outline,
        encoder: DocumentEncoder,
        labels: Any,
        on_missing: str,
        options: dict[str, Any],
    ) -> Reader:
        keys = key_list(outline.keys)
        self.agreement.before_serving(keys)
        given = None if labels is None else labels_of_passages(labels, outline, encoder.around)
        if on_missing == "compute":
            self._store.check_writable()
            misses = ComputeOnMiss(self.space, self.filler, encoder, texts, keys, outline.documents)
            return misses.reader(given, **options)
        if on_missing == "raise":
            check_outline_found(outline, self.space.contains(keys))
        return self.space.reader(keys, labels=given, documents=outline.documents, on_missing=on_missing, **options)

    def passages(self, texts: Iterable[Document], *, field: Field | None = None) -> list[list[Passage]]:
        """Return each document's passages, in order: what the model is given for each, which of these tokens are its
        own, where they stand in the document, and their characters and words there. Nothing is computed.

        Raises:
            UsageError: the recycler does not cut documents into passages.
            DocumentError: see ``fill``; or a document is a pair of texts.
        """
        return self._cutting().cut(listed(documents_in(texts, field)))

    def outline(self, texts: Iterable[Document], *, field: Field | None = None) -> Outline:
        """Return the passages of documents, which are streamed, as arrays: their keys, whose they are, which tokens are
        their own. ``store.put_collection(name, outline.keys, documents=outline.documents, own=outline.own)`` keeps it.

        Raises:
            UsageError, DocumentError: see ``passages``.
        """
        return outline_of(self._cutting(), documents_in(texts, field))

    def revision(
        self, old: Iterable[Document], new: Iterable[Document], *, field: Field | None = None, stored: bool = True
    ) -> Revision:
        """Say what a revision of a corpus costs: what of the new documents the old ones have, and what is to be
        computed. Nothing is computed. Also where documents are whole, or cut into windows.

        Args:
            stored: whether the old documents have to be in the space.

        Raises:
            MissingEntryError: old documents are not in the space: nothing of them can be used again.
            UsageError, DocumentError: see ``fill``.
        """
        encoder = self.agreement.encoder
        if not isinstance(encoder, DocumentEncoder):
            raise UsageError(f"revisions are of texts, and {self.recipe.model} reads none")
        before = outline_of(encoder, documents_in(old, field))
        if stored:
            check_revised(before, self.space.contains(before.keys))
        return compare(before, outline_of(encoder, documents_in(new, field)), self.recipe.row_bytes)

    def _cutting(self) -> DocumentEncoder:
        encoder = self.agreement.encoder
        if not isinstance(encoder, DocumentEncoder) or encoder.passages is None:
            raise UsageError("this recycler cuts no passages: make it with too_long=actcache.passages(max_length)")
        return encoder

    def rows(self, texts: Iterable[Document] | None = None, *, device: Any = "cpu", **options: Any) -> RowReader:
        """Return batches of rows ``[n, hidden]``, mixed across these documents; None for all of the space. See
        ``actcache.RowReader`` for the options. Windows' rows are their document's, as ``RowBatch.documents`` says.

        Raises:
            MissingEntryError, LowerHalfMismatchError, CanaryError, UsageError: see ``reader``.
        """
        return RowReader(self.space, **self.row_keys(texts), device=device, **options)

    def pooled(self, texts: Iterable[Document] | None = None, how: Any = "mean") -> NDArray[np.float32]:
        """Return one row a document, ``[documents, hidden]`` float32; see ``Space.pooled``.

        Raises:
            UsageError: documents are cut into windows, of which several may have a token: pool those of
                ``space.pooled(recycler.keys(texts))``.
            MissingEntryError, LowerHalfMismatchError, CanaryError: see ``reader``.
        """
        for what in ("windows", "passages"):
            if getattr(self.agreement.encoder, what) is not None:
                raise UsageError(
                    f"documents are cut into {what} here: pool these, by space.pooled(recycler.keys(texts))"
                )
        return self.space.pooled(self.row_keys(texts).get("keys"), how)

    def row_keys(self, texts: Iterable[Document] | None) -> dict[str, Any]:
        """Return the arguments by which a ``RowReader`` is told of documents, and see that they may be served."""
        if texts is None:
            self.agreement.before_serving([])
            return {}
        given = listed(texts)
        if (cut := self._outline(given)) is not None:
            self.agreement.before_serving(key_list(cut[0].keys))
            check_outline_found(cut[0], self.space.contains(cut[0].keys))
            return {"keys": key_list(cut[0].keys), "documents": cut[0].documents}
        keys = self.agreement.encoder.keys(given)
        self.agreement.before_serving(keys)
        found = find_entries(self.space, keys, self.agreement.encoder.windows)
        check_found(keys, found)
        documents = np.repeat(np.arange(len(keys)), [len(entries) for entries in found])
        return {"keys": list(itertools.chain.from_iterable(found)), "documents": documents}

    def keys(self, texts: Iterable[Document], *, field: Field | None = None) -> list[bytes]:
        """Return the keys of these documents' entries, in order.

        Where documents are cut into windows, those are their windows' keys; raises ``MissingEntryError`` where not all
        are in the space. Where they are cut into passages, the passages' keys, whether they are there or not.
        """
        if (cut := self._outline(documents_in(texts, field))) is not None:
            return key_list(cut[0].keys)
        keys = self.agreement.encoder.keys(listed(documents_in(texts, field)))
        if self.agreement.encoder.windows is None:
            return keys
        found = find_entries(self.space, keys, self.agreement.encoder.windows)
        check_found(keys, found)
        return list(itertools.chain.from_iterable(found))

    def chats(self, conversations: Iterable[Any], *, field: str | None = None, **template: Any) -> Chats:
        """Return conversations as documents of token ids, with what the assistant said marked token by token.

        What is too long is cut at its end where the recycler truncates, and else left to ``fill`` to refuse.

        Args:
            conversations: lists of messages (``{"role": ..., "content": ...}``), or
            field: the name of the data set's column that holds them.
            template: options of the tokenizer's ``apply_chat_template``.

        Raises:
            DocumentError, UsageError: see ``models.chats.encode_chats``.
        """
        encoder = self.agreement.encoder
        if not isinstance(encoder, DocumentEncoder):
            raise UsageError(f"conversations are text, and {self.recipe.model} reads none")
        cut = encoder.max_length if encoder.too_long == "truncate" else None
        return encode_chats(encoder.tokenizer, documents_in(conversations, field), max_length=cut, **template)

    @overload
    def reduce(self, task_model: Model) -> Model: ...
    @overload
    def reduce(self, task_model: Any) -> Any: ...
    def reduce(self, task_model: Any) -> Any:
        """Return a copy of a task model that starts from this space's activations; see ``actcache.models.reduce``.

        It knows the recipe that it belongs to, and is saved with it. A ``SentenceTransformer``, or its ``Transformer``
        module, becomes one that looks texts up: see ``actcache.models.clients.sentence_transformers``.

        Raises:
            LowerHalfMismatchError: the task model's lower half is not the recorded one, or computes other numbers.
        """
        if type(task_model).__module__.startswith("sentence_transformers."):
            from actcache.models.clients import sentence_transformers  # who has such a model has the library

            encoder = self.agreement.encoder
            if not isinstance(encoder, DocumentEncoder):
                raise UsageError(f"a {type(task_model).__name__} reads texts, and {self.recipe.model} reads none")
            return sentence_transformers.reduce(task_model, encoder, self._source(), self.reduce)
        layer = self._start(task_model)
        check_same_lower_half(task_model, self.recipe)
        self.agreement.check_task_model(task_model)
        reduced = replay.reduce(task_model, layer, self._of_one_shape(task_model))
        self._check_one_shape(reduced)
        reduced.__dict__["actcache_recipe"] = self.recipe
        return reduced

    def consumer(
        self,
        task_model: Model,
        tokenizer: Any,
        *,
        how: consumers.How = "add",
        width: int | None = None,
        start: consumers.Start = "itself",
    ) -> Model:
        """Return a copy of a smaller task model that takes this space's rows beside its own input embeddings.

        Cross-model recycling, appendix A.3 of the paper: an MLP of two layers with ReLU, which trains with the rest,
        makes of each token's stored row what joins the token's embedding. It is called, trained and saved as a reduced
        model is: ``consumer(**batch.model_inputs())`` of this recycler's readers. On texts that are not stored the
        larger model is computed, by a reader with ``on_missing="compute"``.

        Args:
            task_model: a full task model of another size; not changed. All of it runs.
            tokenizer: the task model's own, which must have the source's token ids for every text.
            how: ``"add"``; ``"gate"``, where a learned gate weighs what is added; ``"concat"``, where a linear layer
                joins both.
            width: of the MLP's hidden layer; by default that of the embeddings.
            start: ``"itself"``, training begins with what the task model computes alone; ``"random"``, the MLP begins
                as torch makes it.

        Raises:
            TokenizationMismatchError: the two models have different token ids for one text.
            LayerError: documents of this space may have more tokens than the task model takes.
            UnsupportedModelError: one of the models takes no text, or embeds other tokens than it is given.
            ModelError: the task model is a reduced or consumer model.
        """
        encoder = self.agreement.encoder
        if not isinstance(encoder, DocumentEncoder):
            raise UnsupportedModelError(
                f"a consumer model shares tokens with its source, and {self.recipe.model} has none"
            )
        own = processor_of(tokenizer, base_model_of(task_model))
        return consumers.make_consumer(
            task_model, own, self.recipe, encoder.tokenizer, how=how, width=width, start=start
        )

    def load_consumer(self, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Return a consumer model that ``save_pretrained`` or the ``Trainer`` wrote; see ``models.load_consumer``."""
        return consumers.load_consumer(folder, self.recipe, **options)

    def _of_one_shape(self, task_model: PreTrainedModel) -> Family | None:
        """Return the family with the shape that the processor makes of all images or sounds; None where that varies."""
        encoder, base = self.agreement.encoder, base_model_of(task_model)
        if not isinstance(encoder, MediaEncoder):
            return None
        shapes = {one.values.shape for one in encoder.canary_features()}
        return replace(family_of(base), input_shape=shapes.pop()) if len(shapes) == 1 else None

    def _check_one_shape(self, reduced: Any) -> None:
        """Refuse images or sounds of several shapes where the upper layers depend on them, for rows do not tell it."""
        encoder, features = self.agreement.encoder, reduced.actcache_features
        if isinstance(encoder, MediaEncoder) and features.rows is not None:
            shapes = {one.values.shape for one in encoder.canary_features()}
            if shapes != {features.shape}:
                raise UnsupportedModelError(
                    f"the upper layers of a {type(reduced).__name__} depend on the size of what the lower ones read, "
                    f"and its processor makes {', '.join(map(str, sorted(shapes)))}: give one that makes "
                    f"{list(features.shape)} of everything"
                )

    def _source(self) -> Any:
        from actcache.models.clients.sentence_transformers import Source

        def supply(texts: Sequence[str]) -> None:
            self._store.check_writable()
            self.filler.supply(texts, range(len(texts)), TOKEN_BUDGET)

        return Source(self.space, self._store.address, supply if self._store.writable else None)

    def load_reduced(self, folder: str | os.PathLike[str], **options: Any) -> Any:
        """Return a reduced model that ``save_pretrained`` or the ``Trainer`` wrote; see ``models.load_reduced``. Where
        that is a ``SentenceTransformer``'s folder, it is one."""
        if Path(folder, "modules.json").exists():
            from actcache.models.clients import sentence_transformers

            return sentence_transformers.load(folder, self._source())
        return loading.load_reduced(folder, self.recipe, **options)

    def verify(
        self,
        sample: int = 100,
        *,
        texts: Iterable[Document] | None = None,
        task_model: PreTrainedModel | None = None,
        seed: int = 0,
    ) -> Verification:
        """Compute a sample of documents again and compare with what is stored.

        ``space.verify()`` shows that entries are what was put; this shows that they are what the model computes. An
        entry's relative error may be that of other kernels in the compute dtype (``models.canary.TOLERANCE``) and the
        stored dtype's rounding: 6e-4 for float16 entries computed in float32.

        Args:
            sample: documents to compare, chosen at random; all where there are fewer.
            texts: choose among these, and see that they make the stored tokens; else among all entries, whose token ids
                are stored.
            task_model: a full task model in eval mode, on any device, whose outputs are compared with those of its
                reduced model: each document alone.

        Raises:
            VerificationError: something is further off; it holds the report.
            CorruptEntryError: an entry fails its checksum.
            MissingEntryError: a text is not in the space.
            LowerHalfMismatchError: the task model's lower half is not the one that was recorded.
        """
        if task_model is not None:
            check_same_lower_half(task_model, self.recipe)
        lower, encoder = self.agreement.lower, self.agreement.encoder
        report = verification.verify(
            self.space, lower, encoder, sample=sample, texts=texts, task_model=task_model, seed=seed
        )
        if not report.ok:
            raise VerificationError(
                f"the space does not hold what this model computes: {report}. Remove the entries "
                "(space.delete(error.report.failed)) and fill again, or go back to the model that recorded them",
                report,
            )
        return report

    def regime(
        self,
        regime: Regime | str,
        task_model: PreTrainedModel,
        texts: Iterable[Document],
        *,
        labels: Any = None,
        batch_size: int = 32,
        device: Any = "cpu",
        shuffle: bool = False,
        bucket: bool = False,
        max_tokens: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        **reading: Any,
    ) -> Prepared:
        """Return a copy of a task model, and the batches to train it on, for one of the paper's four regimes.

        ``for batch in batches: model(**batch).loss`` serves all four, and so does the ``Trainer`` with the data set
        ``batches.dataset()`` and its ``collate`` as ``data_collator``. The options alone decide the documents' order.

        Args:
            regime: ``"NR"``, ``"F"``, ``"SR"`` or ``"R"``; see ``actcache.models.training.regimes``.
            task_model: full, with the recorded lower half; not changed.
            texts, labels, batch_size, ...: as of ``reader``. ``device`` is for the batches.
            reading: options of the reader that matter to SR and R alone (``depth``, ``ram_cache``).

        Raises:
            MissingEntryError: R, and documents are not in the space.
            ShapeError: the labels do not fit the documents.
            LowerHalfMismatchError: see ``reduce``.
        """
        kind, documents = Regime.named(regime), listed(texts)
        family = check_same_lower_half(task_model, self.recipe)
        encoder = self.agreement.encoder
        equal = not encoder.has_token_ids
        order = Order(batch_size, max_tokens, shuffle, bucket, seed, drop_last, equal_lengths=equal)
        if kind in (Regime.RECYCLE, Regime.SAVE_AND_RECYCLE):
            reader = self.reader(
                documents,
                labels=labels,
                device=device,
                on_missing="compute" if kind is Regime.SAVE_AND_RECYCLE else "raise",
                **{**vars(order), **reading},
            )
            return Prepared(self.reduce(task_model), regimes.StoredBatches(reader, type(task_model)))
        encoded: Sequence[Sequence[Made]] = encoder.encode(documents)
        owners = np.repeat(np.arange(len(documents)), [len(windows) for windows in encoded])
        given = None
        if labels is not None:
            cut = self._outline(documents)
            many = len(documents)
            given = (
                of_entries(labels, owners, many) if cut is None else labels_of_passages(labels, cut[0], cut[1].around)
            )
        entries = [window for windows in encoded for window in windows]
        dataset = regimes.full_inputs(entries, given, self.agreement.lower, type(task_model))
        model = copy.deepcopy(task_model)
        if kind is Regime.FROZEN:
            regimes.freeze_lower_half(model, family, self._start(task_model))
        return Prepared(model, regimes.TextBatches(dataset, order, torch.device(device)))

    def close(self) -> None:
        """Close the space, and the store where the recycler opened it. Does nothing the second time."""
        if self._owns_store:
            self._store.close()  # and with it the space
        elif hasattr(self, "space"):
            self.space.close()

    def __enter__(self) -> Recycler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Recycler of {self.recipe.model} {self.recipe.site_name}, space {self.recipe.fingerprint}>"

    def _start(self, task_model: PreTrainedModel) -> int | str:
        """Return where a reduced model starts, as ``models.reduce`` takes it."""
        return starts_at(self.recipe, task_model)

    def _log_nearest(self) -> None:
        try:
            nearest = self._store.nearest(self.recipe)
        except DataError as error:
            logger.warning("the other spaces of %s cannot be compared: %s", self._store.url, error)
            return
        # That it is another layer, nobody has to be told: it is what was asked for.
        nearest = [(other, fields) for other, fields in nearest if not {"layer", "site"} & fields.keys()]
        if nearest:
            other, fields = nearest[0]
            differ = "; ".join(f"{name}: {mine} here, {theirs} there" for name, (mine, theirs) in fields.items())
            nearest_is = "this is a new space; the nearest is %s (%s), which differs in %s"
            logger.info(nearest_is, other.fingerprint, other.model, differ)


def _check_of_texts(*, max_length: int | None, extras: tuple[str, ...], special_tokens: bool) -> None:
    """Refuse options that images and audio have no use for."""
    given = {"max_length": max_length is not None, "extras": bool(extras), "special_tokens": special_tokens is not True}
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise UsageError(f"{', '.join(wrong)} is for texts: images and audio have neither tokens nor words")


def _check_extras(extras: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown or isinstance(extras, str):
        raise UsageError(f"extras are of {', '.join(EXTRAS)}, not {extras!r}")
    return tuple(dict.fromkeys(extras))
