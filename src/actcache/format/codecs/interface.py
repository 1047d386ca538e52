"""What every codec is: a way to store rows, and to make numbers of them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CodecOverflowError, NonFiniteError


@dataclass(frozen=True)
class Codec(ABC):
    """One way to store rows ``[tokens, hidden]``: each becomes a row of ``width(hidden)`` items of the stored dtype,
    which needs nothing but itself to be read. Pure and thread-safe. It never stores an infinity or a NaN."""

    name: str
    stored: np.dtype[np.generic]  # dtype of the stored rows
    delivered: np.dtype[np.generic]  # dtype of the rows that ``decode`` returns

    #: Whether each number is rounded alone. Rows that were rounded so before are not changed by it.
    rounds_alone = True
    #: Whether a space's files hold a frame of zstd for each entry's stored rows, which come out of it as they were.
    compressed = False

    @property
    def form(self) -> str:
        """The name of the codec that stores rows in the same form, without compression: its own."""
        return self.name

    def width(self, hidden: int) -> int:
        """Return the items of a stored row; ``RecipeError`` where rows of so many columns cannot be stored so."""
        return hidden

    def hidden(self, width: int) -> int:
        """Return the columns of a row whose stored row has so many items."""
        return width

    @abstractmethod
    def encode(self, rows: NDArray[np.generic], out: NDArray[np.generic], *, what: str = "the document") -> None:
        """Write ``[tokens, hidden]`` rows into ``out``, ``[tokens, width]`` in the stored dtype.

        Args:
            rows: floating point, or already in the stored dtype where that is one.
            what: how an error names the document.

        Raises:
            NonFiniteError: ``rows`` holds NaN or infinity.
            CodecOverflowError: a finite value is too large to be stored so.
        """

    def stored_rows(self, rows: NDArray[np.generic], *, what: str = "the document") -> NDArray[np.generic]:
        """Return what ``encode`` would write, raising as it does: ``rows`` itself where that is what they are, else a
        new array."""
        out = np.empty((*rows.shape[:-1], self.width(rows.shape[-1])), self.stored)
        self.encode(rows, out, what=what)
        return out

    @abstractmethod
    def decode(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Return stored rows, ``[..., width]``, as numbers, ``[..., hidden]``; the same array where they are numbers.
        ``FormatError`` where they hold what ``encode`` never writes."""

    def decode_into(self, stored: NDArray[Any], out: NDArray[Any], dtype: str) -> bool:
        """Write the numbers of stored rows into an array of the dtype of that name (bfloat16: its bits, uint16), faster
        than by way of ``decode``; return whether this codec can. Raises as ``decode``, and ``CodecOverflowError``."""
        return False

    @abstractmethod
    def bound(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        """Return how far the numbers of each stored row, ``[n, width]``, are at most from those that were encoded, as
        float32: the L2 norm of the difference, ``[n]``."""

    def decode_tensor(self, torch: Any, stored: Any) -> Any:
        """Return ``decode`` of a tensor, on its device, by ``torch``, the module. What ``stray`` finds is not looked
        for: it was, on the host."""
        return stored

    def stray(self, stored: NDArray[Any]) -> NDArray[np.int64]:
        """Return the positions of stored rows, ``[n, width]``, that ``encode`` never writes (a scale that is no number,
        say), as far as that is seen at a glance: their checksums may be right all the same. None there: empty."""
        return _NONE

    def stray_among(self, stored: NDArray[Any], which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what ``stray`` does of the rows ``which``, ``[m]``, as positions in ``which``. For codecs that look at
        a part of each row: to override, so that the others are not copied."""
        return self.stray(stored[which])

    def refuse(self, rows: NDArray[np.generic], finite: NDArray[np.bool_], what: str) -> NoReturn:
        """Raise what is wrong with rows, the first of whose numbers that is not finite when stored is named."""
        token, column = np.argwhere(~finite)[0].tolist()
        value = float(rows[token, column])
        where = f"{what} holds {value:g} at token {token}, column {column}"
        if np.isfinite(value):
            raise CodecOverflowError(
                f"{where}, too large for {self.name}: store it as bfloat16 or float32 (another recipe, another space)"
            )
        raise NonFiniteError(f"{where}: the model computed no number there; nothing of this call was stored")


@dataclass(frozen=True)
class Wrapped(Codec):
    """A codec that stores rows as another one does."""

    base: Codec

    @property
    def rounds_alone(self) -> bool:  # type: ignore[override]
        return self.base.rounds_alone

    @property
    def form(self) -> str:
        return self.base.form

    def width(self, hidden: int) -> int:
        return self.base.width(hidden)

    def hidden(self, width: int) -> int:
        return self.base.hidden(width)

    def encode(self, rows: NDArray[np.generic], out: NDArray[np.generic], *, what: str = "the document") -> None:
        self.base.encode(rows, out, what=what)

    def stored_rows(self, rows: NDArray[np.generic], *, what: str = "the document") -> NDArray[np.generic]:
        return self.base.stored_rows(rows, what=what)

    def decode(self, stored: NDArray[Any]) -> NDArray[Any]:
        return self.base.decode(stored)

    def decode_into(self, stored: NDArray[Any], out: NDArray[Any], dtype: str) -> bool:
        return self.base.decode_into(stored, out, dtype)

    def bound(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        return self.base.bound(stored)

    def decode_tensor(self, torch: Any, stored: Any) -> Any:
        return self.base.decode_tensor(torch, stored)

    def stray(self, stored: NDArray[Any]) -> NDArray[np.int64]:
        return self.base.stray(stored)

    def stray_among(self, stored: NDArray[Any], which: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.base.stray_among(stored, which)


_NONE = np.empty(0, np.int64)
