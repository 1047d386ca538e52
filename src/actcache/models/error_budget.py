"""What a codec does to a model's numbers, measured on a sample: rows, final hidden states, a task's outputs.

Each document of the sample is computed once by the lower half; the layers above then run from its exact rows and from
what the codec makes of them. So the error is that of storing alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actcache.errors import (
    CodecOverflowError,
    DocumentError,
    ErrorBudgetError,
    LayerError,
    ModelError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from actcache.format import codec, frames
from actcache.format.keys import Document
from actcache.models.agreement import Agreement
from actcache.models.canary import Encoder
from actcache.models.documents import check_texts
from actcache.models.families import Family, base_model_of, family_of
from actcache.models.lower_half import TOKEN_BUDGET, LowerHalf, plan_encoded
from actcache.models.pretrained import load_pretrained
from actcache.models.processing import Features, Made
from actcache.models.replay import reduce
from actcache.models.tokenizing import DocumentEncoder, Encoded, check_max_length
from actcache.store.space import Space
from actcache.store.stored_errors import BLOB_NAME, METRICS, StoredErrors

SAMPLE = 32  # documents

#: What ``choose`` tries, beside what a recycler has: a float that loses next to nothing, then what takes fewer bytes.
CANDIDATES = ("float32", "float16", "bfloat16", "float8_e4m3", "int8")


@dataclass(frozen=True)
class Choice:
    """The codec and layer of fewest bytes within a budget; of equal ones the highest layer."""

    dtype: str
    layer: int | str  # or another site's name
    metric: str
    max_error: float
    tried: Mapping[tuple[int | str, str], StoredErrors | None] = field(repr=False)  # None: the codec refuses these rows

    def __str__(self) -> str:
        error = self.tried[self.layer, self.dtype]
        found = (
            "" if error is None else f": {self.metric} within {error.of(self.metric):.2g} (allowed {self.max_error:g})"
        )
        return f"layer {self.layer} as {self.dtype}{found}"


class ErrorMeter:
    """Measures codecs on one sample of documents, cut to what the model takes. Not thread-safe.

    Args:
        texts: the documents.
        task_model: whose outputs are compared, too; in eval mode.
        sample: documents at most whose rows are compared.
        compared: of these, at most, from whose rows the layers above are run.

    Raises:
        UsageError: there are none.
    """

    def __init__(
        self,
        lower: LowerHalf,
        encoder: Encoder,
        texts: Iterable[Document],
        *,
        task_model: PreTrainedModel | None = None,
        sample: int = SAMPLE,
        compared: int = SAMPLE,
    ) -> None:
        documents = [text for _, text in zip(range(sample), texts, strict=False)]
        if not documents:
            raise UsageError("no texts were given, so there is nothing to measure")
        encoder = encoder.truncating if isinstance(encoder, DocumentEncoder) else encoder
        self._inputs: list[Made] = [windows[0] for windows in encoder.encode(documents)]
        self._compared = compared
        self._rows = _computed(lower, self._inputs)
        family = _of_one_shape(lower.family, self._inputs)
        self._above = _Above(lower.base_model, lower, family)
        self._task = None if task_model is None else _Above(task_model, lower, family)

    def measure(self, dtype: str, via: Sequence[str] = ()) -> StoredErrors:
        """Return what storing as ``dtype`` does.

        Raises:
            NonFiniteError, CodecOverflowError: the codec refuses rows of the sample.
        """
        one, to_store = codec.get(dtype), codec.get(dtype, via)
        stored = [to_store.stored_rows(rows) for rows in self._rows]
        nbytes = frames.sizes_of(stored).sum() if one.compressed else sum(rows.nbytes for rows in stored)
        bits = 8 * float(nbytes) / sum(rows.size for rows in self._rows)
        return self.compare(dtype, bits, [one.decode(rows).astype(np.float32) for rows in stored])

    @property
    def rows(self) -> list[NDArray[np.float32]]:
        """The exact rows of each document, ``[tokens, hidden]``."""
        return self._rows

    def compare(self, name: str, bits: float, decoded: Sequence[NDArray[np.float32]]) -> StoredErrors:
        """Return how far other rows are from the exact ones, whatever made them; ``name`` and ``bits`` are noted."""
        some = self._inputs[: self._compared]
        norms = np.array([np.linalg.norm(rows.astype(np.float64)) for rows in self._rows])
        pairs = zip(decoded, self._rows, strict=True)
        off = np.array([np.linalg.norm(found.astype(np.float64) - rows) for found, rows in pairs])
        return StoredErrors(
            name,
            len(self._rows),
            sum(map(len, self._rows)),
            bits,
            float(np.linalg.norm(off) / (np.linalg.norm(norms) or 1.0)),
            float((off / np.where(norms > 0, norms, 1.0)).max()),
            self._above.change(some, self._rows, decoded),
            None if self._task is None else self._task.change(some, self._rows, decoded),
        )


def _computed(lower: LowerHalf, inputs: Sequence[Made]) -> list[NDArray[np.float32]]:
    rows: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(inputs)
    for batch in plan_encoded(inputs, TOKEN_BUDGET):
        computed = lower.run_encoded([inputs[i] for i in batch])[lower.site]
        for i, array in zip(batch, computed, strict=True):
            rows[i] = array.astype(np.float32)
    return rows


def _of_one_shape(family: Family, inputs: Sequence[Made]) -> Family:
    """Return a family with the shape of all images or sounds, where they have one: a reduced model may ask for it."""
    shapes = {one.values.shape for one in inputs if isinstance(one, Features)}
    return replace(family, input_shape=shapes.pop()) if len(shapes) == 1 else family


class _Above:
    """Compares what the layers above make of two versions of rows."""

    def __init__(self, model: PreTrainedModel, lower: LowerHalf, family: Family) -> None:
        self._reduced: PreTrainedModel | None = None
        if not model.training and lower.site.layer is not None:
            with suppress(ModelError, LayerError):  # nothing starts from these rows
                self._reduced = reduce(model, lower.site.layer, family).eval()
        self._exact: list[dict[str, torch.Tensor]] | None = None

    def change(
        self, inputs: Sequence[Made], exact: Sequence[NDArray[Any]], decoded: Sequence[NDArray[Any]]
    ) -> float | None:
        """Return the relative change of all outputs of the first documents, those of ``inputs``, together; None where
        there is no model, or none that takes images of several shapes."""
        if self._reduced is None:
            return None
        if self._exact is None:
            try:
                self._exact = [self._outputs(*pair) for pair in zip(inputs, exact, strict=False)]
            except ShapeError:
                self._reduced = None
                return None
        off = norm = 0.0
        for given, rows, expected in zip(inputs, decoded, self._exact, strict=False):
            for name, value in self._outputs(given, rows).items():
                off += float((value - expected[name]).double().square().sum())
                norm += float(expected[name].double().square().sum())
        return math.sqrt(off) / (math.sqrt(norm) or 1.0)

    @torch.inference_mode()
    def _outputs(self, given: Made, rows: NDArray[Any]) -> dict[str, torch.Tensor]:
        assert self._reduced is not None
        device = self._reduced.device
        inputs = {"activations": torch.from_numpy(np.ascontiguousarray(rows))[None].to(device)}
        if isinstance(given, Encoded):
            inputs["token_ids"] = torch.from_numpy(given.token_ids.astype(np.int64))[None].to(device)
            inputs["attention_mask"] = torch.ones_like(inputs["token_ids"])
        outputs = self._reduced(**inputs)
        return {
            name: value
            for name, value in outputs.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()
        }


def check_metric(metric: str, *, of_task: bool = False) -> None:
    """Refuse what is no metric, with a ``UsageError``; ``logits`` only where there is a task model that makes them."""
    known = METRICS if of_task else METRICS[:2]
    if metric not in METRICS:
        raise UsageError(f"metric is {' or '.join(map(repr, known))}, not {metric!r:.40}")


def check_budget(found: StoredErrors, max_error: float, metric: str) -> None:
    """Refuse a codec that is above a budget, with an ``ErrorBudgetError``."""
    error = found.of(metric)
    if error is None:
        raise UsageError(f"{metric} cannot be measured: the model that makes them is not at hand; take another metric")
    if not error <= max_error:
        raise ErrorBudgetError(
            f"{found.dtype} changes {metric} by {error:.2g} (relative, {found.documents} documents), more than the "
            f"{max_error:g} that are allowed: take a codec of more bytes, or allow more. Nothing was stored"
        )


def choose(meters: Mapping[int | str, ErrorMeter], dtypes: Sequence[str], *, max_error: float, metric: str) -> Choice:
    """Return the cheapest of some codecs and layers within a budget; see ``Recycler.choose``."""
    check_metric(metric, of_task=True)
    tried: dict[tuple[int | str, str], StoredErrors | None] = {}
    for layer, meter in meters.items():
        for dtype in dtypes:
            try:
                tried[layer, dtype] = meter.measure(dtype)
            except CodecOverflowError:
                tried[layer, dtype] = None
    if all(error is not None and error.of(metric) is None for error in tried.values()):
        raise UsageError(f"{metric} cannot be measured: the model that makes them is not at hand; take another metric")

    within = {
        one: error for one, error in tried.items() if error is not None and (error.of(metric) or 0.0) <= max_error
    }

    def cost(one: tuple[int | str, str]) -> tuple[float, int]:
        return within[one].bits, -one[0] if isinstance(one[0], int) else 0

    if not within:
        found = ", ".join(
            f"layer {layer} as {dtype} {'refused' if error is None else f'{error.of(metric):.2g}'}"
            for (layer, dtype), error in tried.items()
        )
        raise ErrorBudgetError(f"nothing that was tried changes {metric} by {max_error:g} or less: {found}")
    layer, dtype = min(within, key=cost)
    return Choice(dtype, layer, metric, max_error, tried)


# --- before a fill ----------------------------------------------------------------------------------------------------


def measured(
    texts: Iterable[Document],
    agreements: Sequence[Agreement],
    max_error: float | None,
    metric: str,
) -> Iterable[Document]:
    """Measure what storing does, on the first of some documents, and keep that with the spaces; return the documents.

    Where nobody sets a budget, a space is measured once, and only where its codec scales rows: others round each number
    alone, by what is known of them.

    Raises:
        ErrorBudgetError: a codec is above ``max_error``.
        UsageError: there is no such metric, or it cannot be measured.
    """
    check_metric(metric)
    due = [one for one in agreements if max_error is not None or _unmeasured(one.space)]
    if not due:
        return texts
    sample, texts = peeked(texts)
    for one in due if sample else []:
        recipe = one.space.recipe
        try:
            found = ErrorMeter(one.lower, one.encoder, sample).measure(recipe.dtype, recipe.via)
        except (NonFiniteError, DocumentError):
            continue  # the fill says of which document
        if max_error is not None:
            check_budget(found, max_error, metric)
        found.write(one.space)
    return texts


def _unmeasured(space: Space) -> bool:
    return not codec.get(space.recipe.dtype).rounds_alone and space.blob(BLOB_NAME) is None


class _Rejoined(Iterable[Document]):
    """What was taken from an iterator, and the rest of it."""

    def __init__(self, first: list[Document], rest: Iterator[Document], length: int) -> None:
        self._first, self._rest, self._length = first, rest, length

    def __iter__(self) -> Iterator[Document]:
        return itertools.chain(self._first, self._rest)

    def __length_hint__(self) -> int:
        return self._length if self._length >= 0 else NotImplemented


def peeked(texts: Iterable[Document], count: int = SAMPLE) -> tuple[list[Document], Iterable[Document]]:
    """Return the first documents, and all of them: what only streams by is not asked for its documents again."""
    check_texts(texts)
    length, iterator = length_hint(texts, -1), iter(texts)
    first = list(itertools.islice(iterator, count))
    return first, texts if isinstance(texts, Sequence) or not first else _Rejoined(first, iterator, length)


def errors_by_codec(
    name: str | Path,
    texts: Iterable[Document],
    *,
    layer: int,
    dtypes: Iterable[str],
    device: str | None = None,
    max_length: int | None = None,
) -> dict[str, StoredErrors | None]:
    """Load a model, and return what storing a sample as each of some codecs does; None where one refuses its rows.
    Raises as ``load_pretrained`` and ``LowerHalf`` do."""
    model, tokenizer = load_pretrained(name, [], device, None)
    base = base_model_of(model)
    family = family_of(base)
    longest = check_max_length(max_length, tokenizer, family.max_tokens(base.config))
    encoder = DocumentEncoder(tokenizer, longest, "truncate", True)
    meter = ErrorMeter(LowerHalf(base, family, layer), encoder, texts)
    found: dict[str, StoredErrors | None] = {}
    for dtype in dtypes:
        try:
            found[dtype] = meter.measure(dtype)
        except CodecOverflowError:
            found[dtype] = None
    return found
