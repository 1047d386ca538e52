"""Recipes: what decides the numbers of a space (identity) and where they came from (provenance).

The identity names the space: two runs share entries exactly when every field of it is equal. The provenance is recorded
beside it and compared only by way of canary documents (``actcache.models.canary``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actcache.errors import FormatError, RecipeError
from actcache.format import codec
from actcache.format.arguments import dtype_name, is_truth, is_whole
from actcache.io.notebook import table

#: What a document longer than ``max_length`` becomes.
TOO_LONG = ("refuse", "truncate", "windows", "passages")
COMPUTE_DTYPES = ("float32", "float16", "bfloat16", "float64")

_LARGEST = (1 << 31) - 1  # so that no size that a store names overflows
_MOST_STEPS = 8  # of a lineage
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SITE = re.compile(r"[^\s.:]+(\.[^\s.:]+)*(:input)?")


def canonical_json(value: Any) -> str:
    """Return the one JSON text that equal values have: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def is_fingerprint(name: str) -> bool:
    return _FINGERPRINT.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the entries of a space are made. Immutable and hashable by its identity.

    Args:
        model: model id or path. Part of the identity only where ``weights`` is not given.
        layer: the entries are the output of this layer, 1-based; 0 for what goes into layer 1.
        site: in the place of ``layer``, the module whose output, or with ``:input`` at the end whose input, the entries
            are: ``layers.5.mlp``, ``layers.5.mlp:input``. The path begins at the base model.
        hidden_size: columns of an entry.
        dtype: how rows are stored, the name of a codec: ``float16``, ``float32``, ``bfloat16``, ``int8``, ... (see
            docs/codecs.md).
        weights: digest of the weights of all that comes before the rows; None where it is not known.
        config: the model's configuration values that change the lower half's numbers.
        compute_dtype: what the lower half computes in.
        tokenizer: digest of the tokenizer's canonical form.
        special_tokens: whether the tokenizer adds its special tokens.
        max_length: tokens that a document may have, special tokens included; None for no limit.
        too_long: what a longer document becomes: ``refuse``, ``truncate``, ``windows`` or ``passages``.
        via: the dtypes that rows were rounded to before they came to be stored as ``dtype``; none for rows that are
            stored as they were computed. ``stored_again`` makes such recipes. Rows that are put are rounded likewise.
        provenance: model id, revision, library versions, device, ...: recorded, not part of the identity.

    Raises:
        RecipeError: a field has a value that no recipe can have.
    """

    model: str
    layer: int | None = None
    site: str | None = None
    hidden_size: int
    dtype: str = "float16"
    weights: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    compute_dtype: str = "float32"
    tokenizer: str | None = None
    special_tokens: bool = True
    max_length: int | None = None
    too_long: str = "refuse"
    via: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        def check(good: bool, what: str) -> None:
            if not good:
                raise RecipeError(what)

        check(isinstance(self.model, str) and bool(self.model), "model must be a model id or path")
        check(
            (self.layer is None) != (self.site is None),
            f"a recipe has either a layer or a site, not layer {self.layer!r:.40} and site {self.site!r:.40}",
        )
        for name, number, least in (
            ("layer", self.layer, 0),
            ("hidden_size", self.hidden_size, 1),
            ("max_length", self.max_length, 1),
        ):
            good = name != "hidden_size" if number is None else is_whole(number) and least <= number <= _LARGEST
            check(good, f"{name} {number!r:.40} is no whole number from {least} to {_LARGEST}")
        check(
            self.site is None or (isinstance(self.site, str) and _SITE.fullmatch(self.site) is not None),
            f"site {self.site!r:.80} is no path of a module, such as layers.5.mlp or layers.5.mlp:input",
        )
        for name in ("dtype", "compute_dtype"):
            object.__setattr__(self, name, dtype_name(getattr(self, name)))
        known = f"{', '.join(codec.names())}, or one of these and {codec.COMPRESSED}"
        check(codec.is_name(self.dtype), f"dtype {self.dtype!r} is not one of {known}")
        good = isinstance(self.compute_dtype, str) and self.compute_dtype in COMPUTE_DTYPES
        check(good, f"compute_dtype {self.compute_dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}")
        codec.get(self.dtype).width(self.hidden_size)
        for name, value in (("weights", self.weights), ("tokenizer", self.tokenizer)):
            good = value is None or (isinstance(value, str) and bool(value))
            check(good, f"{name} is a digest or None, not {value!r}")
        check(is_truth(self.special_tokens), f"special_tokens is True or False, not {self.special_tokens!r}")
        check(
            isinstance(self.provenance, Mapping)
            and all(isinstance(text, str) for item in self.provenance.items() for text in item),
            "provenance must map names to texts: make other values texts with str()",
        )
        check(self.too_long in TOO_LONG, f"too_long {self.too_long!r} is not one of {', '.join(TOO_LONG)}")
        check(
            isinstance(self.via, list | tuple)
            and len(self.via) <= _MOST_STEPS
            and all(name in codec.names() for name in self.via),
            f"via holds names of dtypes ({', '.join(codec.names())}), not {self.via!r:.80}",
        )
        object.__setattr__(self, "via", tuple(self.via))
        kept = codec.traces((*self.via, self.dtype), self.compute_dtype)
        check(
            kept == self.via,
            f"rows that were {', '.join(self.via)} and are stored as {self.dtype} have the lineage "
            f"{', '.join(kept) or 'of rows that are stored at once'}: let recipe.stored_again(dtype) say it",
        )
        try:
            config = json.loads(canonical_json(_plain(dict(self.config))))
        except (TypeError, ValueError, RecursionError) as error:
            raise RecipeError(f"config must hold JSON values only: {error}") from None
        for name in ("layer", "hidden_size", "max_length"):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(number))
        object.__setattr__(self, "special_tokens", bool(self.special_tokens))
        object.__setattr__(self, "config", config)  # the caller's own may change after this
        object.__setattr__(self, "provenance", dict(self.provenance))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.fingerprint == other.fingerprint

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the numbers, as JSON values."""
        return {
            "weights": self.weights if self.weights is not None else {"model": self.model},
            "config": dict(self.config),
            **({"layer": self.layer} if self.site is None else {"site": self.site}),
            "hidden_size": self.hidden_size,
            "compute_dtype": self.compute_dtype,
            "tokenizer": self.tokenizer,
            "special_tokens": self.special_tokens,
            "max_length": self.max_length,
            "too_long": self.too_long,
            "dtype": self.dtype,
            **({"via": list(self.via)} if self.via else {}),
        }

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: the BLAKE2b digest of the identity. It is the name of the space."""
        text = canonical_json(self.identity())
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"actcache/recipe").hexdigest()

    @property
    def site_name(self) -> str:
        """Where in the model the rows are taken, for people: ``layer 6``, or the site."""
        return f"layer {self.layer}" if self.site is None else self.site

    @property
    def stored_as(self) -> str:
        """How rows are stored, for people: ``float32``, or ``float32 via float16`` where they were that before."""
        return " via ".join([self.dtype, *reversed(self.via)])

    @property
    def row_bytes(self) -> int:
        """The bytes of one token's row, as stored."""
        kind = codec.get(self.dtype)
        return kind.stored.itemsize * kind.width(self.hidden_size)

    @property
    def format_version(self) -> int:
        """The version of the format that tells of such entries: 1 where releases of before codecs read them."""
        if self.too_long == "passages":
            return 4
        return 1 if {self.dtype, *self.via} <= {"float16", "float32", "bfloat16"} else 2

    def stored_again(self, dtype: str) -> Recipe:
        """Return the recipe of this one's rows stored again, as another dtype; ``RecipeError`` where there is none.

        It is that of rows that were stored so at once only where the numbers are the same: float32 to float16 or
        bfloat16, and back to the dtype that they came from. Else it says in ``via`` what they were before. Compression
        changes no number.
        """
        if codec.base(dtype) == codec.base(self.dtype):
            return replace(self, dtype=dtype)
        return replace(self, dtype=dtype, via=codec.traces((*self.via, self.dtype, dtype), self.compute_dtype))

    def facts(self) -> list[tuple[str, object]]:
        """Return what people ask first of a recipe, by name: model, layer, size of a row, how it is stored, ..."""
        known = {"model": self.model, "layer": self.layer, "hidden size": self.hidden_size, "stored as": self.stored_as}
        known |= {"computed in": self.compute_dtype, "longest document": self.max_length, "longer ones": self.too_long}
        return [(name, value) for name, value in known.items() if value is not None]

    def _repr_html_(self) -> str:
        rows = [*self.facts(), *self.provenance.items()]
        return table(f"Recipe {self.fingerprint}", dict(rows).items())

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the identity fields in which this recipe and another differ, as ``field -> (this, other)``."""
        mine, theirs = _flat(self.identity()), _flat(other.identity())
        return {
            name: (mine.get(name), theirs.get(name))
            for name in sorted(mine.keys() | theirs.keys())
            if (name in mine, mine.get(name)) != (name in theirs, theirs.get(name))
        }

    def to_json(self) -> dict[str, Any]:
        """Return identity and provenance as JSON values; ``from_json`` is the inverse."""
        return {"identity": self.identity(), "provenance": {"model": self.model, **self.provenance}}

    @classmethod
    def from_json(cls, value: Any) -> Recipe:
        """Rebuild a recipe from ``to_json``; ``FormatError`` where the value is not what that returns."""
        try:
            identity, provenance = dict(value["identity"]), dict(value["provenance"])
            if not all(isinstance(item, str) for item in provenance.values()):
                raise TypeError("a provenance value is no text")
            if isinstance(identity["weights"], dict):
                identity["weights"] = None
            return cls(model=provenance["model"], provenance=provenance, **identity)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"not a recipe of this format version: {error}") from None


def _plain(value: Any) -> Any:
    """Return a value with NumPy's numbers and truth values in it as Python's."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) and value.dtype.kind in "biuf" else value


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in identity.items() if name != "config"}
    return flat | {f"config.{name}": value for name, value in identity["config"].items()}
