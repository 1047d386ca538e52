"""The recycler: one pretrained model, cut after one layer, and the space where its activations are kept."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import DataError, ModelError, UsageError
from actcache.format.keys import Document, Windows
from actcache.format.ragged import EXTRAS
from actcache.format.recipe import Recipe
from actcache.models import weights
from actcache.models.agreement import Agreement
from actcache.models.budget import ByteBudget
from actcache.models.compute_on_miss import ComputeOnMiss
from actcache.models.documents import check_texts, document_keys, listed
from actcache.models.families import base_model_of, family_of
from actcache.models.filling import TOKEN_BUDGET, Filler, FillReport
from actcache.models.partial import vocabulary_size
from actcache.models.provenance import origin, revision_of, setup_of
from actcache.models.record import LowerHalf
from actcache.models.tasks import TaskModels
from actcache.models.tokenizing import DocumentEncoder, TooLong, check_max_length, tokenizer_digest
from actcache.reader.labels import of_entries
from actcache.reader.reader import Reader
from actcache.store.document_entries import check_found, find_entries
from actcache.store.store import Store, open_store

logger = logging.getLogger(__name__)


class Recycler(TaskModels):
    """Records the activations of a model after one layer, and serves them to reduced models. Not thread-safe.

    Args:
        model: a base or task model of transformers, in eval mode. It is used as it is, never changed.
        tokenizer: its tokenizer; not changed.
        layer: record the output of this layer, 1-based, 1..N-1.
        store: a ``Store``, or a URL or path of one, which the recycler then opens and closes.
        dtype: how rows are stored: ``float16``, ``float32`` or ``bfloat16``; None for the family's own, which is
            ``bfloat16`` for T5, Llama, Qwen and Gemma, whose activations overflow ``float16``, and else ``float16``.
        compute_dtype: what the lower half computes in, where that is not its parameters' dtype: ``bfloat16``,
            ``float16`` (by autocast).
        max_length: tokens that a document may have, special tokens included; by default what model and tokenizer allow.
        too_long: what becomes of longer documents: ``"refuse"`` them, ``"truncate"`` them, or cut all into
            ``actcache.windows(max_length, stride)``.
        special_tokens: whether texts get the tokenizer's special tokens.
        extras: of ``spans``, ``word_ids``, ``type_ids``, what is stored beside the token ids.
        provenance: the caller's own notes, recorded with a space that this creates.
        check_canaries: whether the space's canaries (five small documents) are computed and compared here and before
            each fill, reader and reduced model. Hooks, adapters' scales and numbers that were changed on a module show
            nowhere else: without the check their numbers are taken for the stored ones.

    Attributes:
        recipe: what decides the numbers.
        space: where they are; created where it was absent.

    Raises:
        LayerError, RecipeError, UnsupportedModelError, ModelError: model and options do not fit.
        CanaryError: the space's canary documents come out differently with this model here.
        StoreError: the store cannot be opened, or is read-only and has no such space.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layer: int,
        store: Store | str | Path,
        dtype: str | None = None,
        compute_dtype: str | None = None,
        max_length: int | None = None,
        too_long: TooLong = "refuse",
        special_tokens: bool = True,
        extras: Sequence[str] = (),
        provenance: Mapping[str, str] | None = None,
        check_canaries: bool = True,
    ) -> None:
        base = base_model_of(model)
        family = family_of(base)
        self._lower = LowerHalf(base, family, layer, compute_dtype)
        layer = self._lower.layer
        stored_extras = _check_extras(extras)
        self._encoder = DocumentEncoder(
            tokenizer,
            check_max_length(max_length, tokenizer, family.max_tokens(base.config)),
            too_long,
            special_tokens,
            vocabulary=vocabulary_size(base),
            extras=stored_extras,
        )
        self._setup = setup_of(self._lower)
        self.recipe = Recipe(
            model=str(base.config.name_or_path or type(base).__name__),
            layer=layer,
            hidden_size=self._lower.hidden_size,
            dtype=dtype or family.dtype,
            weights=weights.lower_digest(base, family, layer),
            config=family.numbers_of(base.config),
            compute_dtype=self._lower.compute_dtype,
            tokenizer=tokenizer_digest(tokenizer),
            special_tokens=self._encoder.special_tokens,
            max_length=self._encoder.max_length,
            too_long="windows" if isinstance(too_long, Windows) else too_long,
            provenance={**self._setup, **revision_of(base), **origin(), **(provenance or {})},
        )
        self._store = store if isinstance(store, Store) else open_store(store)
        self._owns_store = self._store is not store
        try:
            self.space = self._store.space(self.recipe)
            self._agreement = Agreement(
                self.space, self._encoder, self._lower, self._setup, enabled=bool(check_canaries)
            )
            parts = [(self.space, self._lower)]
            self._filler = Filler(parts, self._encoder, stored_extras, [self._agreement])
            self._agreement.when_opened()
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
        layer: int,
        store: Store | str | Path,
        dtype: str | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Recycler:
        """Load base model and tokenizer, and return their recycler.

        Args:
            device: where the lower half runs; None for a CUDA device where there is one, else the CPU.
            revision: of the model on the hub.
            options: the other arguments of ``Recycler``.

        Raises:
            ModelError: they cannot be loaded.
        """
        model, tokenizer = load_pretrained(name_or_path, [layer], device, revision)
        return cls(model, tokenizer, layer=layer, store=store, dtype=dtype, **options)

    # --- recording ---------------------------------------------------------------------------------------------------

    def fill(
        self,
        texts: Iterable[Document],
        *,
        token_budget: int = TOKEN_BUDGET,
        progress: bool = True,
        max_bytes: int | str | None = None,
    ) -> FillReport:
        """Compute and store the documents that are not in the space; durable when it returns.

        A fill that was interrupted (Ctrl-C) or killed goes on where it was when it is called again: what is stored is
        skipped. An interrupt loses nothing, a kill what was computed in the last minute (docs/reliability.md). All
        windows of a document are stored together.

        Args:
            texts: any iterable of documents; it is streamed. Of a table give a column: ``frame["text"]``.
            token_budget: padded tokens of a batch. Documents of similar length are computed together.
            progress: whether to show a bar (a line now and then where stderr is no terminal).
            max_bytes: that the space takes on the medium at most, what was there before included: a number or a size
                like ``"200GiB"``. From the first document on that does not fit, all that are missing are left out.

        Raises:
            UsageError: ``texts`` are none: one text, a table, a file, ..., or an iterator that gives nothing.
            DocumentError, DocumentTooLongError: a document cannot be stored; it names its position.
            NonFiniteError, CodecOverflowError: a document's rows do not fit the stored dtype; it names its position.
            LowerHalfMismatchError: the model's lower half was trained since the recycler was made.
            ModelError: the model is in train mode.
            CanaryError: the lower half computes other numbers than those of the space (a hook, an adapter, ...).
            StoreError: read-only, disk full, ...; what was stored before stays.
        """
        check_texts(texts)
        self._store.check_writable()
        self._filler.check()
        budget = None if max_bytes is None else ByteBudget.of(max_bytes, self._store, [self.space])
        return self._filler.fill(texts, token_budget, progress, budget)

    # --- replay ------------------------------------------------------------------------------------------------------

    def reader(
        self,
        texts: Iterable[Document],
        *,
        labels: Any = None,
        batch_size: int = 32,
        device: Any = "cpu",
        on_missing: str = "raise",
        **options: Any,
    ) -> Reader:
        """Return a reader of these documents' entries; see ``actcache.Reader`` for the other options.

        Where documents are cut into windows, each window is an entry of the batches: it has its document's label, and
        ``Batch.documents`` says whose it is, as a position in ``texts``.

        Args:
            on_missing: ``"compute"`` computes and stores the missing documents of each batch when its turn comes (and
                those that are corrupt), and delivers them as they are stored: the first epoch fills, later ones replay,
                and both see the same numbers. The lower half is computed where the recycler's model is. They are
                durable at the end of the epoch, and when a minute old. Windows of missing documents are counted by
                tokenizing them at once.

        Raises:
            MissingEntryError: documents are not (or, of windows, not wholly) in the space.
            LowerHalfMismatchError: the model's lower half was trained since the recycler was made.
            CanaryError: the model computes other numbers than those of the space (a hook, an adapter, ...).
            ReadOnlyError: ``"compute"`` with a store that was opened read-only.
            UsageError: ``texts`` are none; see ``fill``.
        """
        documents_given = listed(texts)
        keys = document_keys(documents_given)
        self._agreement.before_serving(keys)
        options |= {"batch_size": batch_size, "device": device}
        if on_missing == "compute":
            self._store.check_writable()
            way = ComputeOnMiss(self.space, self._filler, self._encoder, documents_given, keys)
            return way.reader(labels, **options)
        found = find_entries(self.space, keys, self._encoder.windows)
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

    def keys(self, texts: Iterable[Document]) -> list[bytes]:
        """Return the keys of these documents' entries, in order.

        Where documents are cut into windows, those are their windows' keys, and documents must be in the space.

        Raises:
            MissingEntryError: a document's windows are not, or not all, in the space.
        """
        keys = document_keys(listed(texts))
        if self._encoder.windows is None:
            return keys
        found = find_entries(self.space, keys, self._encoder.windows)
        check_found(keys, found)
        return list(itertools.chain.from_iterable(found))

    # --- the rest ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the space, and the store where the recycler opened it. Does nothing the second time."""
        if self._owns_store:
            self._store.close()  # and with it the space
        elif hasattr(self, "space"):
            self.space.close()

    def __enter__(self) -> Recycler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Recycler of {self.recipe.model} layer {self.recipe.layer}, space {self.recipe.fingerprint}>"

    def _log_nearest(self) -> None:
        try:
            nearest = self._store.nearest(self.recipe)
        except DataError as error:
            logger.warning("the other spaces of %s cannot be compared: %s", self._store.url, error)
            return
        if nearest:
            other, fields = nearest[0]
            differ = "; ".join(f"{name}: {mine} here, {theirs} there" for name, (mine, theirs) in fields.items())
            logger.info(
                "created an empty space; the nearest is %s (%s), which differs in %s",
                other.fingerprint,
                other.model,
                differ,
            )


def load_pretrained(
    name_or_path: str | Path,
    layers: Iterable[int],
    device: str | torch.device | None,
    revision: str | None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load base model and tokenizer as ``Recycler.from_pretrained`` does, and learn the digests of these layers.

    Args:
        dtype: of the weights; None for the one that they are saved in.
    """
    name = str(name_or_path)
    try:
        options = {} if dtype is None else {"dtype": dtype}
        model = AutoModel.from_pretrained(name, revision=revision, **options).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # of transformers, safetensors, tokenizers, the hub, ...
        raise ModelError(f"{name} cannot be loaded: {_first_line(error)}") from error
    base = base_model_of(model)
    family = family_of(base)
    for layer in layers:
        layer = family.check_layer(base, layer)
        # The digest stays known within the process, so that the constructor does not compute it again.
        weights.pretrained_digest(base, family, layer, weights.weight_files(name, revision))
    try:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        raise ModelError(f"{name} cannot be moved to the device {device}: {_first_line(error)}") from error
    return model, tokenizer


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_extras(extras: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown or isinstance(extras, str):
        raise UsageError(f"extras are of {', '.join(EXTRAS)}, not {extras!r}")
    return tuple(dict.fromkeys(extras))
