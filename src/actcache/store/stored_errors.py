"""What storing did to rows: measured when a space was filled, and kept with it as ``errors.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from actcache.errors import FormatError
from actcache.io.notebook import Shown

if TYPE_CHECKING:
    from actcache.store.space import Space

BLOB_NAME = "errors.json"
METRICS = ("rows", "hidden", "logits")


@dataclass(frozen=True)
class StoredErrors(Shown):
    """How far stored rows of a sample are from the computed ones. Errors are relative: L2 of the difference, by that of
    what it is the error of, over all documents together."""

    dtype: str  # the codec
    documents: int
    tokens: int
    bits: float  # stored bits of each number, compressed where they are
    rows: float  # error of the rows
    worst: float  # of the entry that has the largest
    hidden: float | None = None  # change of the final hidden states; None where the model above is not at hand
    logits: float | None = None  # change of the task model's outputs; None without one

    def of(self, metric: str) -> float | None:
        """Return one of ``METRICS``."""
        found: float | None = getattr(self, metric)
        return found

    def told(self) -> str:
        """Return the errors for people."""
        known = ("rows", self.rows), ("final hidden states", self.hidden), ("outputs", self.logits)
        errors = ", ".join(f"{name} by {error:.2g}" for name, error in known if error is not None)
        return f"{errors} (relative; {self.documents:,} documents, of which one by {self.worst:.2g})"

    @classmethod
    def read(cls, space: Space) -> StoredErrors | None:
        """Return what was measured when a space was filled, None where nothing was; ``FormatError``: it is damaged."""
        data = space.blob(BLOB_NAME)
        if data is None:
            return None
        try:
            value = json.loads(data)
            if value.pop("format_version") != 1:
                raise ValueError("it is of another version")
            kept = cls(**value)
            numbers = (kept.documents, kept.tokens, kept.bits, kept.rows, kept.worst)
            given = [one for one in (kept.hidden, kept.logits) if one is not None]
            if not isinstance(kept.dtype, str) or not all(isinstance(one, int | float) for one in (*numbers, *given)):
                raise TypeError("fields of other types")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"{BLOB_NAME} of space {space.recipe.fingerprint} is damaged: {error}") from None
        return kept

    def write(self, space: Space) -> None:
        """Keep this with a space, in the place of what was."""
        text = json.dumps({"format_version": 1, **asdict(self)}, indent=1)
        space.put_blob(BLOB_NAME, text.encode() + b"\n", replace=True)
