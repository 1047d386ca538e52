"""Training samples of draft models as other programs keep them: a file a sample, in three formats.

docs/training.md says which. Files are read as tensors alone: nothing in them is executed.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from actcache.admin.inspection import Progress
from actcache.errors import FormatError, MissingEntryError, ShapeError, UsageError
from actcache.format.keys import document_key
from actcache.io.newfile import check_new
from actcache.models.clients.draft_samples import DraftSamples, Layer, stored_dtype
from actcache.store.store import Store

_AT_ONCE = 16  # samples that are put together
_NUMBERED = re.compile(r"hs_(\d+)\.safetensors")


@dataclass(frozen=True)
class ImportedSamples:
    """What an import of samples did."""

    samples: int  # files
    stored: int  # of them, those that were new in any layer
    spaces: list[str]  # fingerprints, in the order of the layers
    loss_masks: int  # samples of which a file says what they are trained on: ``DraftSamples.loss_mask``


@dataclass(frozen=True)
class _Sample:
    token_ids: NDArray[np.int64]  # [T]
    hidden_states: torch.Tensor  # [T, layers, hidden]
    loss_mask: NDArray[np.bool_] | None = None  # [T]


def import_speculators(
    store: Store, folder: str | Path, layers: Sequence[Layer], *, model: str, progress: Progress | None = None
) -> ImportedSamples:
    """Store the samples that speculators keeps (``hs_<number>.safetensors``), a space a layer; what is there is
    skipped. Run it again where it was interrupted.

    Args:
        layers: of a file's second axis, in its order; the last one is the model's last layer, by its number.
        model: the verifier's name, for the recipes.

    Raises:
        UsageError: there is no such file; the last layer is no number.
        FormatError: a file is truncated or holds something else; it is named. What came before it is stored.
        ShapeError: a file has another number of layers, or rows of another size or dtype than the first one.
        NonFiniteError, StoreError: as ``Space.put``.
    """
    _check_last(layers, prenorm=True, program="speculators")
    files = [(int(match[1]), path) for path, match in _matching(folder, _NUMBERED)]
    return _stored(store, [path for _, path in sorted(files)], _of_speculators, layers, model, "speculators", progress)


def import_model_optimizer(
    store: Store, folder: str | Path, layers: Sequence[Layer], *, model: str, progress: Progress | None = None
) -> ImportedSamples:
    """Store the samples that NVIDIA's Model-Optimizer dumped (``*.pt``), as ``import_speculators`` does. Files are
    loaded as weights only; ``hidden_states_prenorm`` in them says whether the last layer is one before the final norm.

    Args:
        layers: of the rows that lie side by side in ``aux_hidden_states``, and that of ``hidden_states``.

    Raises:
        FormatError: also a file with pickled objects, and one whose last rows are on the other side of the norm than
            ``layers`` says.
    """
    files = [path for path, _ in _matching(folder, re.compile(r".+\.pt"))]

    def read(path: Path) -> _Sample:
        return _of_model_optimizer(path, layers)

    return _stored(store, sorted(files), read, layers, model, "model-optimizer", progress)


def export_speculators(
    samples: DraftSamples, token_ids: Iterable[Any], folder: str | Path, progress: Progress | None = None
) -> int:
    """Write ``hs_<number>.safetensors`` files for a data set's samples, by their position in it; return how many.

    Args:
        token_ids: ``[tokens]`` of each sample, in the data set's order.
        folder: new.

    Raises:
        UsageError: the folder stands already; the last rows are those after the final norm.
        MissingEntryError, CorruptEntryError: a sample is absent or damaged; the files before it stay.
    """
    _check_last([1 if samples.prenorm else "norm"], prenorm=True, program="speculators")

    def write(number: int, ids: NDArray[np.int64], rows: torch.Tensor) -> None:
        tensors = {"hidden_states": rows.contiguous(), "token_ids": torch.from_numpy(ids)}
        _written(path / f"hs_{number}.safetensors", lambda place: save_file(tensors, place))

    path = _new_folder(folder)
    return _exported(samples, token_ids, write, progress)


def export_specforge(
    samples: DraftSamples,
    token_ids: Sequence[Any],
    folder: str | Path,
    *,
    loss_masks: Sequence[Any] | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write SpecForge's offline features, a ``.ckpt`` a sample, which sort in the data set's order; return how many.

    Args:
        token_ids: ``[tokens]`` of each sample.
        folder: new; it is SpecForge's ``hidden_states_path``.
        loss_masks: ``[tokens]`` of each sample, 1 at what it is trained on; None for those that were stored.
        norm: the model's final norm, where the last rows are those before it: SpecForge's head takes rows after it.

    Raises:
        UsageError: the folder stands already; there is no norm where one is needed, or one where none is.
        ShapeError: samples and masks are not of one length.
        UsageError: a sample's mask was not stored; the files before it stay.
        MissingEntryError, CorruptEntryError: a sample is absent or damaged; the files before it stay.
    """
    if samples.prenorm != (norm is not None):
        raise UsageError(
            "SpecForge's head takes rows after the model's final norm: "
            + ("give it as norm=model.model.norm" if samples.prenorm else "these are, so leave norm out")
        )
    if loss_masks is not None:
        lengths = [len(mask) for mask in loss_masks]
        if lengths != [len(ids) for ids in token_ids]:
            raise ShapeError(f"{len(token_ids)} samples and {len(lengths)} loss masks: give each one number a token")

    def write(number: int, ids: NDArray[np.int64], rows: torch.Tensor) -> None:
        last = rows[:, -1]
        if norm is not None:
            with torch.no_grad():
                last = norm(last)
        mask = samples.loss_mask(ids) if loss_masks is None else np.asarray(loss_masks[number])
        if mask is None:
            raise UsageError(f"sample {number} was stored without a loss mask: give loss_masks")
        features = {
            "input_ids": torch.from_numpy(ids),
            "loss_mask": torch.from_numpy(mask.astype(np.int64)),
            "hidden_state": last[None].contiguous(),
            "aux_hidden_state": rows[:, :-1].flatten(1)[None].contiguous(),
        }
        _written(path / f"sample_{number:09d}.ckpt", lambda place: torch.save(features, place))

    path = _new_folder(folder)
    return _exported(samples, token_ids, write, progress)


# --- reading ----------------------------------------------------------------------------------------------------------


def _matching(folder: str | Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"{path} is no folder of samples")
    found = False
    for one in sorted(path.rglob("*")):
        if (match := pattern.fullmatch(one.name)) and one.is_file():
            found = True
            yield one, match
    if not found:
        raise UsageError(f"{path} holds no samples: no file in it is named as {pattern.pattern}")


def _stored(
    store: Store,
    files: Sequence[Path],
    read: Callable[[Path], _Sample],
    layers: Sequence[Layer],
    model: str,
    source: str,
    progress: Progress | None,
) -> ImportedSamples:
    samples, stored, masks = None, 0, 0
    try:
        for begin in range(0, len(files), _AT_ONCE):
            some = []
            for path in files[begin : begin + _AT_ONCE]:
                sample = read(path)
                if sample.hidden_states.shape[1] != len(layers):
                    raise ShapeError(f"{path} has {sample.hidden_states.shape[1]} layers, and {len(layers)} are named")
                if samples is None:
                    dtype, hidden = stored_dtype(sample.hidden_states), sample.hidden_states.shape[2]
                    samples = DraftSamples.create(
                        store, layers, model=model, hidden_size=hidden, dtype=dtype, source=source
                    )
                elif stored_dtype(sample.hidden_states) != samples.spaces[0].recipe.dtype:
                    raise ShapeError(f"{path} has rows of {sample.hidden_states.dtype}, and the first file of others")
                some.append(sample)
            assert samples is not None
            masked = [one for one in some if one.loss_mask is not None]
            for part in (masked, [one for one in some if one.loss_mask is None]):
                given: Any = [one.loss_mask for one in part] if part is masked else None
                ids, rows = [one.token_ids for one in part], [one.hidden_states for one in part]
                stored += samples.put(ids, rows, loss_masks=given)
            masks += len(masked)
            if progress is not None:
                progress("import", begin + len(some), len(files))
    finally:
        if samples is not None:
            samples.close()
    assert samples is not None
    return ImportedSamples(len(files), stored, [space.recipe.fingerprint for space in samples.spaces], masks)


def _of_speculators(path: Path) -> _Sample:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path} is no whole safetensors file: {error}") from None
    if "hidden_states_scales" in tensors:
        raise FormatError(f"{path} holds float8 rows with scales: have speculators read them (its fp8 backend)")
    return _Sample(_ids(path, tensors, "token_ids"), _rows(path, tensors, "hidden_states", 3))


def _of_model_optimizer(path: Path, layers: Sequence[Layer]) -> _Sample:
    tensors = _weights(path)
    ids = _ids(path, tensors, "input_ids")
    last, inner = _rows(path, tensors, "hidden_states", 2), _rows(path, tensors, "aux_hidden_states", 2)
    width = last.shape[1]
    if inner.shape[1] != width * (len(layers) - 1) or len(inner) != len(ids) or len(last) != len(ids):
        raise FormatError(
            f"{path} has {len(ids)} tokens, hidden_states {list(last.shape)}, and aux_hidden_states "
            f"{list(inner.shape)}: those of {len(layers) - 1} inner layers are [{len(ids)}, "
            f"{width * (len(layers) - 1)}]"
        )
    prenorm = bool(tensors.get("hidden_states_prenorm", False))
    if prenorm == isinstance(layers[-1], str):
        side, name = ("before", "by its number") if prenorm else ("after", "as the norm's path, such as 'norm'")
        raise FormatError(f"the last rows of {path} are those {side} the final norm: name their layer {name}")
    if inner.dtype != last.dtype:
        raise FormatError(f"{path} has rows of {inner.dtype} and {last.dtype}")
    rows = torch.cat([inner.reshape(len(ids), -1, width), last[:, None]], dim=1)
    mask = tensors.get("loss_mask")
    if mask is None:
        return _Sample(ids, rows)
    if not isinstance(mask, torch.Tensor) or mask.shape != (len(ids),):
        raise FormatError(f"the loss_mask of {path} is not one number a token")
    return _Sample(ids, rows, mask.to(torch.bool).numpy())


def _weights(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = _first_line(error)
        raise FormatError(f"{path} holds more than tensors, and loading that would execute it: {why}") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise FormatError(f"{path} is no whole file of torch.save: {_first_line(error)}") from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, not the tensors of a sample by name")
    return loaded


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _ids(path: Path, tensors: dict[str, Any], name: str) -> NDArray[np.int64]:
    ids = tensors.get(name)
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
        raise FormatError(f"{path} has no {name}, whole numbers")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or int(ids.min()) < 0:
        raise FormatError(f"the {name} of {path} are not [tokens] whole numbers of 0 or more")
    return ids.to(torch.int64).numpy()


def _rows(path: Path, tensors: dict[str, Any], name: str, ndim: int) -> torch.Tensor:
    rows = tensors.get(name)
    if isinstance(rows, torch.Tensor) and rows.ndim == ndim + 1 and len(rows) == 1:
        rows = rows[0]
    if not isinstance(rows, torch.Tensor) or rows.ndim != ndim or not rows.is_floating_point():
        raise FormatError(f"{path} has no {name}, floating point of {ndim} dimensions")
    return rows


# --- writing ----------------------------------------------------------------------------------------------------------


def _check_last(layers: Sequence[Layer], *, prenorm: bool, program: str) -> None:
    if not layers or isinstance(layers[-1], str) == prenorm:
        raise UsageError(f"{program} has rows before the model's final norm: name the last layer by its number")


def _new_folder(folder: str | Path) -> Path:
    path = Path(folder)
    check_new(path)
    path.mkdir(parents=True)
    return path


def _exported(
    samples: DraftSamples,
    token_ids: Iterable[Any],
    write: Callable[[int, NDArray[np.int64], torch.Tensor], None],
    progress: Progress | None,
) -> int:
    total = len(token_ids) if isinstance(token_ids, Sequence) else 0
    count = 0
    for number, given in enumerate(token_ids):
        ids = np.array(given, np.int64)
        rows = samples.get(ids, refresh=number == 0)
        if rows is None:
            raise MissingEntryError(f"sample {number} is not in the store", [document_key(ids)])
        write(number, ids, rows)
        count = number + 1
        if progress is not None:
            progress("export", count, max(total, count))
    return count


def _written(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that under its own it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
