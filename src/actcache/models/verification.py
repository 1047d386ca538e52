"""Verification: a sample of a space's documents is computed again and compared with what is stored.

Checksums show that entries are what was once put; this shows that they are what the model computes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actcache.entries.entry import Entry
from actcache.entries.read import read_intact
from actcache.errors import MissingEntryError, ModelError, UsageError, VerificationError
from actcache.format import codec
from actcache.format.arguments import is_whole, whole
from actcache.format.keys import Document, key_list
from actcache.format.ragged import TOKEN_IDS
from actcache.format.recipe import Recipe
from actcache.io.notebook import Shown
from actcache.models.after_encoder import starts_at
from actcache.models.canary import TOLERANCE, Encoder, relative_error
from actcache.models.documents import listed
from actcache.models.lower_half import TOKEN_BUDGET, LowerHalf, plan_encoded
from actcache.models.partial_vocabulary import vocabulary_size
from actcache.models.passages import check_outline_found, outline_of
from actcache.models.processing import Features, Made
from actcache.models.replay import reduce
from actcache.models.tokenizing import DocumentEncoder, Encoded
from actcache.store.document_entries import check_found, find_entries
from actcache.store.space import Space

# The relative error (L2) that storing adds: a codec's unit roundoff, which no single number exceeds (but for values
# below float16's normal range, which weigh nothing in the whole). Other codecs say it of each entry.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# How much larger an error of outputs may be than one of rows. Measured on MiniLM (layers 1, 3 and 5, float16 and
# bfloat16 entries, a random head): 0.7 to 1.8 times the worst entry's, which itself is half of what is allowed. Wrong
# rows give errors near 1.
AMPLIFICATION = 10.0

_CHUNK = 64  # entries that are held at a time


@dataclass(frozen=True)
class Verification(Shown):
    """What was compared, and how far apart it was. Relative errors are L2 norms: of the difference, by the computed."""

    documents: int  # entries compared
    error: float  # largest relative error of an entry's rows
    largest: float  # largest absolute difference of a number
    tolerance: float  # of ``error``
    failed: list[bytes]  # keys of the entries whose error is above it, or whose text makes other tokens
    output_error: float | None = None  # relative error of the task model's outputs, all entries together
    output_largest: float | None = None
    output_tolerance: float | None = None
    corrupt: list[bytes] = field(default_factory=list)  # keys of entries that fail their checksums: not compared

    @property
    def ok(self) -> bool:
        """Whether everything is within its tolerance."""
        outputs = self.output_error is None or self.output_error <= (self.output_tolerance or 0.0)
        return not self.failed and not self.corrupt and outputs

    def __str__(self) -> str:
        text = (
            f"{self.documents} entries computed again: relative error at most {self.error:.2g} (allowed "
            f"{self.tolerance:.2g}), largest difference {self.largest:.2g}, {len(self.failed)} entries wrong"
        )
        if self.output_error is not None:
            text += (
                f"; outputs: relative error {self.output_error:.2g} (allowed {self.output_tolerance:.2g}), largest "
                f"difference {self.output_largest:.2g}"
            )
        return text


def verify(
    space: Space,
    lower: LowerHalf,
    encoder: Encoder,
    *,
    sample: int,
    texts: Iterable[Document] | None,
    task_model: PreTrainedModel | None,
    seed: int,
) -> Verification:
    """Compare a sample of entries with what the lower half computes; see ``Recycler.verify``, which raises."""
    check_sample(sample)
    rng = np.random.default_rng(whole("seed", seed, 0))
    keys, encoded = _stored(space, sample, rng) if texts is None else _of_texts(space, encoder, sample, texts, rng)
    outputs = None if task_model is None else _Outputs(task_model, lower, space.recipe)
    comparison = _Comparison(space, lower, encoder, outputs)
    with_ids = encoded is None or isinstance(encoder, DocumentEncoder)
    for start in range(0, len(keys), _CHUNK):
        some = slice(start, start + _CHUNK)
        comparison.add(
            keys[some],
            _entries(space, keys[some], encoder, with_ids=with_ids),
            None if encoded is None else encoded[some],
        )
    return comparison.report()


def verify_stored(
    space: Space,
    lower: LowerHalf,
    encoder: Encoder,
    *,
    sample: int,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare a sample of entries with what the lower half makes of the token ids beside them, and report.

    Unlike ``verify`` it goes on where entries are corrupt, which it names, and where they were deleted meanwhile.

    Args:
        seed: of the choice; None for another each time.
        progress: called with the entries that were compared, and how many are to be.

    Raises:
        UsageError: the sample is none, or no entry has token ids.
    """
    check_sample(sample)
    keys = space.key_array()
    there = keys[space.has(TOKEN_IDS, keys)]
    if len(keys) and not len(there):
        raise _without_ids(encoder)
    rng = np.random.default_rng(None if seed is None else whole("seed", seed, 0))
    chosen = key_list(there[_some(len(there), sample, rng)])
    comparison = _Comparison(space, lower, encoder, None)
    corrupt: list[bytes] = []
    for start in range(0, len(chosen), _CHUNK):
        found = intact_entries(space, chosen[start : start + _CHUNK], corrupt)
        if found:
            comparison.add(list(found), list(found.values()), None)
        if progress is not None:
            progress(min(start + _CHUNK, len(chosen)), len(chosen))
    return replace(comparison.report(), corrupt=corrupt)


def check_sample(sample: object) -> None:
    """Raise ``UsageError`` where a number of documents to verify is no whole number of 1 or more."""
    if not is_whole(sample) or sample < 1:
        raise UsageError(f"a sample of {sample!r} documents verifies nothing: give a whole number of 1 or more")


def intact_entries(space: Space, keys: list[bytes], corrupt: list[bytes]) -> dict[bytes, Entry]:
    """Return the entries that are there, intact and with token ids; note the keys of corrupt ones."""
    found, intact, bad = read_intact(space.get, keys)
    corrupt += bad
    entries = zip(key_list(intact), found, strict=True)
    return {key: entry for key, entry in entries if entry is not None and entry.token_ids is not None}


def disagreeing(space: Space, lower: LowerHalf, encoder: Encoder, keys: list[bytes]) -> list[bytes]:
    """Return those of some entries that are not what the lower half makes of the token ids beside them.

    Absent and corrupt ones and those without token ids are passed over; so are two texts that nothing tells apart.
    """
    if not isinstance(encoder, DocumentEncoder):
        return []
    found = intact_entries(space, keys, [])
    typed = "token_type_ids" in encoder.tokenizer.model_input_names
    if typed and not encoder.special_tokens:
        found = {key: entry for key, entry in found.items() if "type_ids" in entry.extras}
    comparison = _Comparison(space, lower, encoder, None)
    if found:
        comparison.add(list(found), list(found.values()), None)
    return comparison.report().failed


class _Comparison:
    """Collects how far entries are from what a lower half computes."""

    def __init__(self, space: Space, lower: LowerHalf, encoder: Encoder, outputs: _Outputs | None) -> None:
        self._lower, self._outputs = lower, outputs
        # The token that ends each of two texts, where these have type ids.
        self._separator = None
        if isinstance(encoder, DocumentEncoder) and "token_type_ids" in encoder.tokenizer.model_input_names:
            self._separator = encoder.tokenizer.sep_token_id
        # Storing adds the rounding of each dtype that rows were rounded to.
        dtypes = {codec.base(dtype) for dtype in (*space.recipe.via, space.recipe.dtype)}
        self._tolerance = TOLERANCE[lower.compute_dtype] + sum(ROUNDING.get(dtype, 0.0) for dtype in dtypes)
        self._lossy = [codec.get(dtype) for dtype in sorted(dtypes - ROUNDING.keys())]
        self._most_allowed = self._tolerance
        self._errors: list[float] = []
        self._failed: list[bytes] = []
        self._largest = 0.0

    def add(self, keys: list[bytes], entries: list[Entry], encoded: Sequence[Made] | None) -> None:
        """Compare some entries with what their texts make, or, with None, with what their own token ids do."""
        own = [_input(entry) for entry in entries] if encoded is None else []
        inputs: Sequence[Made] = own if encoded is None else encoded
        found = _errors(self._lower, entries, inputs, self._lossy)
        if encoded is None and self._separator is not None:
            self._as_pairs(entries, own, found)
        for key, entry, given, (error, difference, lost) in zip(keys, entries, inputs, found, strict=True):
            self._errors.append(error)
            self._most_allowed = max(self._most_allowed, self._tolerance + lost)
            self._largest = max(self._largest, difference)
            same = isinstance(given, Features) or np.array_equal(_input(entry).token_ids, given.token_ids)
            if not (same and error <= self._tolerance + lost):  # NaN does not agree
                self._failed.append(key)
            elif self._outputs is not None:
                self._outputs.compare(entry, given)

    def _as_pairs(self, entries: list[Entry], inputs: list[Encoded], found: list[_Error]) -> None:
        """Take wrong entries for documents of two texts, whose type ids were not stored; keep what is right."""
        for i, given in enumerate(inputs):
            ends = np.flatnonzero(given.token_ids == self._separator)
            if found[i].is_within(self._tolerance) or len(ends) < 2 or "type_ids" in entries[i].extras:
                continue
            paired = replace(given, type_ids=(np.arange(len(given.token_ids)) > ends[0]).astype(np.int8))
            again = _errors(self._lower, [entries[i]], [paired], self._lossy)[0]
            if again.is_within(self._tolerance):
                found[i], inputs[i] = again, paired

    def report(self) -> Verification:
        """Return what was found."""
        worst = float(np.max(self._errors)) if self._errors else 0.0  # max() would pass over a NaN
        report = Verification(len(self._errors), worst, self._largest, self._most_allowed, self._failed)
        if (outputs := self._outputs) is None:
            return report
        allowed = AMPLIFICATION * self._most_allowed
        return replace(report, output_error=outputs.error, output_largest=outputs.largest, output_tolerance=allowed)


class _Outputs:
    """Compares what a full task model makes of token ids with what its reduced model makes of stored rows."""

    def __init__(self, task_model: PreTrainedModel, lower: LowerHalf, recipe: Recipe) -> None:
        if task_model.training:
            raise ModelError(f"the {type(task_model).__name__} is in train mode: call model.eval() first")
        self._lower = lower
        self._full, self._reduced = task_model, reduce(task_model, starts_at(recipe, task_model), lower.family).eval()
        self._difference = self._norm = self.largest = 0.0

    @property
    def error(self) -> float:
        """Relative error of all outputs so far."""
        return math.sqrt(self._difference) / (math.sqrt(self._norm) or 1.0)

    @torch.inference_mode()
    def compare(self, entry: Entry, given: Made) -> None:
        """Run one document alone through both."""
        device = self._full.device
        rows = torch.from_numpy(np.array(entry.activations))[None].to(device)
        if isinstance(given, Features):
            self._add(self._full(**self._lower.feature_inputs(given)), self._reduced(activations=rows))
            return
        ids = torch.from_numpy(given.token_ids.astype(np.int64))[None].to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if given.type_ids.any():
            inputs["token_type_ids"] = torch.from_numpy(given.type_ids.astype(np.int64))[None].to(device)
        reduced = self._reduced(activations=rows, token_ids=ids, attention_mask=inputs["attention_mask"])
        self._add(self._full(**inputs), reduced)

    def _add(self, full: Any, reduced: Any) -> None:
        for name, value in full.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                difference = (reduced[name] - value).double()
                self._difference += float(difference.square().sum())
                self._norm += float(value.double().square().sum())
                self.largest = max(self.largest, float(difference.abs().max()))


def _stored(space: Space, sample: int, rng: np.random.Generator) -> tuple[list[bytes], None]:
    """Return the keys of some entries of the space."""
    keys = space.key_array()
    if not len(keys):
        raise UsageError("the space is empty, so there is nothing to verify: fill it first")
    return key_list(keys[_some(len(keys), sample, rng)]), None


def _some(count: int, sample: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return some of ``count`` positions, chosen at random, ascending."""
    return np.sort(rng.choice(count, min(sample, count), replace=False))


def _of_texts(
    space: Space, encoder: Encoder, sample: int, texts: Iterable[Document], rng: np.random.Generator
) -> tuple[list[bytes], list[Made]]:
    """Return the keys of some texts' entries, and what the texts make."""
    documents = listed(texts)
    if not documents:
        raise UsageError("no texts were given, so there is nothing to verify")
    positions = _some(len(documents), sample, rng).tolist()
    chosen = [documents[i] for i in positions]
    if isinstance(encoder, DocumentEncoder) and encoder.passages is not None:
        outline = outline_of(encoder, chosen)
        check_outline_found(outline, space.contains(outline.keys))
        passages = list({one.key(): one for cut in encoder.cut(chosen, positions) for one in cut}.values())
        return [one.key() for one in passages], [one for (one,) in encoder.encode(passages)]
    keys = encoder.keys(chosen)
    found = find_entries(space, keys, encoder.windows)
    check_found(keys, found)
    encoded: Sequence[Sequence[Made]] = encoder.encode(chosen, positions)
    for position, entries, windows in zip(positions, found, encoded, strict=True):
        if len(entries) != len(windows):
            raise VerificationError(
                f"position {position} of the texts makes {len(windows)} windows, and {len(entries)} are stored: delete "
                "them (space.delete(recycler.keys([text]))) and fill again"
            )
    return list(itertools.chain.from_iterable(found)), list(itertools.chain.from_iterable(encoded))


def _entries(space: Space, keys: list[bytes], encoder: Encoder, *, with_ids: bool) -> list[Entry]:
    found = space.get(keys)
    missing = [key for key, entry in zip(keys, found, strict=True) if entry is None]
    if missing:
        raise MissingEntryError(f"{len(missing)} entries were deleted while they were verified: verify again", missing)
    entries = [entry for entry in found if entry is not None]
    if with_ids and any(entry.token_ids is None for entry in entries):
        raise _without_ids(encoder)
    return entries


def _without_ids(encoder: Encoder) -> UsageError:
    if isinstance(encoder, DocumentEncoder):
        return UsageError("entries were stored without token ids, so they cannot be computed again: put them anew")
    return UsageError(
        f"entries of {'images' if encoder.images else 'audio'} hold nothing that they could be computed again from: "
        "give the documents themselves, recycler.verify(texts=documents)"
    )


def _input(entry: Entry) -> Encoded:
    ids = np.asarray(entry.token_ids, np.int32)
    types = entry.extras.get("type_ids")
    return Encoded(ids, np.zeros(len(ids), np.int8) if types is None else types.astype(np.int8))


class _Error(NamedTuple):
    """How far an entry is from what was computed."""

    relative: float
    largest: float  # absolute difference
    lost: float  # relative error that its codecs may have made of it

    def is_within(self, tolerance: float) -> bool:
        return self.relative <= tolerance + self.lost


def _errors(
    lower: LowerHalf, entries: Sequence[Entry], inputs: Sequence[Made], lossy: Sequence[codec.Codec]
) -> list[_Error]:
    """Return how far each entry is from what the lower half computes; ``lossy``: codecs that rows went through."""
    result = [_Error(math.inf, math.inf, 0.0)] * len(entries)
    possible = [i for i, given in enumerate(inputs) if computable(lower, given)]
    for batch in plan_encoded([inputs[i] for i in possible], TOKEN_BUDGET):
        batch = np.array(possible)[batch]
        some = [inputs[i] for i in batch]
        computed = lower.run_encoded(some)[lower.site]
        for i, rows in zip(batch, computed, strict=True):
            stored = entries[i].activations
            if stored.shape == rows.shape:
                largest = float(np.abs(stored.astype(np.float64) - rows).max())
                lost = sum(codec.relative_bound(kind, rows) for kind in lossy)
                result[i] = _Error(relative_error(rows, stored), largest, lost)
    return result


def computable(lower: LowerHalf, given: Made) -> bool:
    """Return whether the model takes these numbers; what somebody else put may be anything."""
    if isinstance(given, Features):
        return True  # they come from the caller's own document
    config = lower.base_model.config
    longest, kinds = lower.family.max_tokens(config), getattr(config, "type_vocab_size", None)
    return (
        given.token_ids.min() >= 0
        and given.token_ids.max() < vocabulary_size(lower.base_model)
        and (longest is None or len(given.token_ids) <= longest)
        and given.type_ids.min() >= 0
        and (not kinds or not given.type_ids.any() or given.type_ids.max() < kinds)
    )
