"""dictionary_learning: a stored space in the place of its ``ActivationBuffer``, for its ``trainSAE``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from actcache.errors import UsageError
from actcache.format.keys import Keys
from actcache.reader.rows import RowReader
from actcache.store.space import Space


class ActivationBuffer(Iterator[Any]):
    """Yields ``[out_batch_size, hidden]`` tensors of stored rows for ever; each row once an epoch. Not thread-safe.

    It has what ``dictionary_learning`` asks of its own buffer: iteration, ``device``, ``out_batch_size``,
    ``d_submodule``, ``config`` (saved with the dictionary as JSON) and ``close``.

    Args:
        spaces: a space; or two whose documents are the same, a transcoder's input and output: then batches are
            ``[out_batch_size, 2, hidden]``, as ``io="in_and_out"`` gives them.
        keys: of the documents; None for all.
        out_batch_size: rows of a batch.
        device: a torch device.
        options: the others of ``Space.rows``: ``buffer``, ``exclude``, ``seed``, ...

    Raises:
        MissingEntryError, ShapeError, UsageError: as ``Space.rows``.
    """

    def __init__(
        self,
        spaces: Space | tuple[Space, Space],
        keys: Keys | None = None,
        *,
        out_batch_size: int = 8192,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        if options.keys() & {"beside", "forever", "batch_size"}:
            raise UsageError("a buffer gives rows alone, for ever, out_batch_size at a time: use space.rows for others")
        both = list(spaces) if isinstance(spaces, tuple) else [spaces]
        self.device, self.out_batch_size = device, out_batch_size
        self.d_submodule = both[0].recipe.hidden_size
        self.io = "out" if len(both) == 1 else "in_and_out"
        self._recipes = [space.recipe for space in both]
        sources = both if len(both) > 1 else both[0]
        self._rows = RowReader(sources, keys, batch_size=out_batch_size, device=device, forever=True, **options)

    def __next__(self) -> torch.Tensor:
        batch: torch.Tensor = next(self._rows)
        return batch

    @property
    def config(self) -> dict[str, Any]:
        """What is saved with a dictionary: which rows it was trained on."""
        return {
            "d_submodule": self.d_submodule,
            "io": self.io,
            "out_batch_size": self.out_batch_size,
            "device": str(self.device),
            "model": self._recipes[0].model,
            "layer": [recipe.layer for recipe in self._recipes],
            "spaces": [recipe.fingerprint for recipe in self._recipes],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return where it is, for ``load_state_dict``."""
        state: dict[str, Any] = self._rows.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with exactly the next row."""
        self._rows.load_state_dict(state)

    def close(self) -> None:
        """End the thread that reads ahead."""
        self._rows.close()
