"""The digest of a lower half's weights, which is the heart of a space's identity, and whether a model has it.

Every byte is looked at each time, because nothing cheaper is certain: optimizers, ``param.data`` and NumPy views change
weights in ways that version counters do not show. What is remembered is the cryptographic digest, by a checksum that
runs ten times as fast (xxh3) and, across processes, by that checksum and the weight files' path, size and time. The
files alone do not say what was loaded: what a checkpoint lacks is initialized at random, and a file can be replaced
meanwhile.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from actcache.errors import LowerHalfMismatchError, ModelError
from actcache.format.recipe import Recipe, canonical_json
from actcache.models import memo
from actcache.models.families import Family, base_model_of, family_of
from actcache.models.lower_half import LowerHalf
from actcache.models.lower_state import lower_states
from actcache.models.partial_vocabulary import Whole
from actcache.models.sites import Site, Where, site_in
from actcache.models.tensors import dtype_name, without_bytes

_CHUNK = 1 << 24  # bytes that one thread hashes at a time; part of the digest's definition
_SMALL = 1 << 16  # bytes that take less time to hash than to hand to a thread
_MEMO_VERSION = 3
_MEMO = "weights"
_RACY_SECONDS = 2.0

#: What a value in a state dict comes down to: ``None``, truth values, numbers and texts stand for themselves.
Leaf = torch.Tensor | Whole | None | bool | int | float | str

_digests: dict[str, str] = {}  # quick checksum -> digest, of lower halves seen in this process


def lower_digest(base_model: PreTrainedModel, family: Family, where: Where) -> str:
    """Return the digest of what comes before a site (of layer k, embeddings and layers 1..k): 64 hexadecimal digits.

    It covers the names (relative to the part or layer), dtypes, shapes and bytes of all that their forward can read:
    parameters and buffers, of modules that were added (adapters) too, packed and quantized weights, tensors that are
    plain attributes, and what it reads beside the layers (rotary frequencies); see ``actcache.models.lower_state``.
    What comes behind, pooler and heads are not looked at. Of a model whose vocabulary was pruned, it is that of the
    whole embedding matrix, with the rows that the model holds as they are now. The lower half is run once, for a few
    tokens.
    Hashes in as many threads as there are processors; not thread-safe beside other uses of the model.

    Raises:
        ModelError: the weights are not in memory (``meta`` device), the rows that pruning dropped are not at hand, or
            something in the lower half cannot be hashed; it is named.
    """
    return next(iter(lower_digests(base_model, family, [where]).values()))


def lower_digests(base_model: PreTrainedModel, family: Family, places: Sequence[Where]) -> dict[Site, str]:
    """Return ``lower_digest`` of several sites: the model is run once, what several of them cover is hashed once."""
    sites = _sites(base_model, family, places)
    quick = _checksums(base_model, family, sites, xxhash.xxh3_128_digest)
    unknown = [site for site in sites if quick[site] not in _digests]
    if unknown:
        for site, digest in _checksums(base_model, family, unknown, _strong).items():
            _digests[quick[site]] = digest
    return {site: _digests[quick[site]] for site in sites}


def check_same_lower_half(model: PreTrainedModel, recipe: Recipe) -> Family:
    """Return the family of a base or task model that has the recipe's lower half.

    Raises:
        LowerHalfMismatchError: weights or configuration of the lower half are others; it names the fields.
        LayerError, UnsupportedModelError: the model has no such layer or module as the recipe's.
    """
    return check_same_lower_halves(model, [recipe])


def check_same_lower_halves(model: PreTrainedModel, recipes: Sequence[Recipe]) -> Family:
    """Return the family of a model that has the lower halves of some recipes; else as ``check_same_lower_half``."""
    base = base_model_of(model)
    family = family_of(base)
    sites = [site_in(base, family, recipe) for recipe in recipes]
    for recipe in recipes:
        _check_numbers(model, family.numbers_of(base.config), recipe)
    digests = lower_digests(base, family, sites)
    for site, recipe in zip(sites, recipes, strict=True):
        _check_weights(model, digests[site], recipe)
    return family


def _check_numbers(model: PreTrainedModel, theirs: Mapping[str, Any], recipe: Recipe) -> None:
    ours = recipe.config
    different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if different:
        fields = "; ".join(f"{name}: {theirs.get(name)!r}, recorded {ours.get(name)!r}" for name in different)
        raise LowerHalfMismatchError(
            f"the lower half of this {type(model).__name__} computes other numbers than the recorded one: its "
            f"configuration differs ({fields}). Record its activations with a recycler of its own"
        )


def _check_weights(model: PreTrainedModel, digest: str, recipe: Recipe) -> None:
    if digest != recipe.weights:
        dtype, recorded = dtype_name(base_model_of(model).dtype), recipe.provenance.get("weights_dtype")
        hint = "" if recorded in (None, dtype) else f" (they are {dtype}, load the model with dtype {recorded})"
        raise LowerHalfMismatchError(
            f"the {_lower_half(recipe)} of this {type(model).__name__} have other weights than those "
            f"that were recorded{hint}: they were fine-tuned, adapted, or are another model's. Keep the lower half "
            "frozen, or record its activations with a recycler of its own"
        )


def _lower_half(recipe: Recipe) -> str:
    if recipe.layer is None:
        return f"modules before {recipe.site}"
    return f"embeddings or layers 1..{recipe.layer}" if recipe.layer else "embeddings"


def pretrained_digests(
    base_model: PreTrainedModel, family: Family, places: Sequence[Where], files: list[Path]
) -> dict[Site, str]:
    """Return ``lower_digests`` of a model just loaded from ``files``, from a small file of memos where they are known.

    Files that changed in size or time are hashed again, and files that were written less than two seconds ago are not
    remembered, for another write could leave their time as it is. A memo that cannot be read or written is ignored.
    """
    sites = _sites(base_model, family, places)
    quick = _checksums(base_model, family, sites, xxhash.xxh3_128_digest)
    names = {site: _memo_name(quick[site], site.name, files) for site in sites}
    remembered = memo.read(_MEMO)
    for site, name in names.items():
        if name is not None and isinstance(known := remembered.get(name), str) and len(known) == 64:
            _digests.setdefault(quick[site], known)
    digests = lower_digests(base_model, family, sites)
    named = {name: digests[site] for site, name in names.items() if name is not None}
    new = {name: digest for name, digest in named.items() if remembered.get(name) != digest}
    if new:
        memo.write(_MEMO, remembered | new)
    return digests


def weight_files(name_or_path: str, revision: str | None = None) -> list[Path]:
    """Return the resolved weight files that ``from_pretrained`` reads; empty where that cannot be told."""
    try:
        config = cached_file(name_or_path, "config.json", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return []
    folder = Path(config or "").parent
    if config is None or (folder / "adapter_config.json").exists():  # the base model's weights lie elsewhere
        return []
    return sorted(path.resolve() for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))


def _strong(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def _checksums(
    base_model: PreTrainedModel, family: Family, sites: Sequence[Site], hash_chunk: Callable[[memoryview], bytes]
) -> dict[Site, str]:
    states = lower_states(base_model, family, sites)
    found = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # both functions free the GIL while they run
        hashes = _Hashes(hash_chunk, pool)
        for site, state in states.items():
            named = (leaf for name, value in state for leaf in leaves(name, value))
            found[site] = [
                (canonical_json(_header(name, leaf)).encode(), hashes.of(leaf))
                for name, leaf in sorted(named, key=lambda item: item[0])
            ]
        return {site: _combined(jobs) for site, jobs in found.items()}


def _combined(jobs: list[tuple[bytes, list[Future[bytes]]]]) -> str:
    whole = hashlib.blake2b(digest_size=32, person=b"actcache/weights")
    for header, digests in jobs:
        whole.update(len(header).to_bytes(8, "little") + header)
        for digest in digests:
            whole.update(digest.result())
    return whole.hexdigest()


def _sites(base_model: PreTrainedModel, family: Family, places: Sequence[Where]) -> list[Site]:
    return list(dict.fromkeys(LowerHalf(base_model, family, where).site for where in places))


def _header(name: str, leaf: Leaf) -> list[Any]:
    if isinstance(leaf, torch.Tensor | Whole):
        return [name, str(leaf.dtype), list(leaf.shape)]
    return [name, "value", leaf]


class _Hashes:
    """Hashes tensors a chunk at a time, each once while this is there, however often it is asked for."""

    def __init__(self, hash_chunk: Callable[[memoryview], bytes], pool: ThreadPoolExecutor) -> None:
        self._hash, self._pool = hash_chunk, pool
        self._known: dict[Any, tuple[Leaf, list[Future[bytes]]]] = {}  # the leaf is held, so that its memory stays its

    def of(self, leaf: Leaf) -> list[Future[bytes]]:
        """Return the digests of a value's chunks; none where it stands in its header."""
        if isinstance(leaf, Whole):  # put together where it is hashed, a chunk at a time
            key: Any = leaf.memory
        elif isinstance(leaf, torch.Tensor):
            key = leaf.device, leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()
        else:
            return []
        if key not in self._known:
            self._known[key] = leaf, self._begun(leaf)
        return self._known[key][1]

    def _begun(self, leaf: torch.Tensor | Whole) -> list[Future[bytes]]:
        if isinstance(leaf, Whole):
            return [self._pool.submit(self._of_whole, leaf, start) for start in range(0, leaf.nbytes, _CHUNK)]
        flat = leaf.cpu().contiguous().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
        data = memoryview(flat.numpy())  # type: ignore[arg-type]
        chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
        if len(data) > _SMALL:
            return [self._pool.submit(self._hash, chunk) for chunk in chunks]
        return [_done(self._hash(chunk)) for chunk in chunks]

    def _of_whole(self, whole: Whole, start: int) -> bytes:
        return self._hash(whole.read(start, start + _CHUNK))


def _done(digest: bytes) -> Future[bytes]:
    future: Future[bytes] = Future()
    future.set_result(digest)
    return future


def _memo_name(quick: str, site: int | str, files: list[Path]) -> str | None:
    try:
        stats = [(file, file.stat()) for file in files]
    except OSError:
        return None
    if not stats or any(time.time() - stat.st_mtime < _RACY_SECONDS for _, stat in stats):
        return None
    what = [_MEMO_VERSION, [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats], site, quick]
    return hashlib.blake2b(canonical_json(what).encode(), digest_size=16).hexdigest()


def leaves(name: str, value: Any) -> Iterator[tuple[str, Leaf]]:
    """Yield the parts of a value by name: plain strided tensors (detached, on their device), and JSON values.

    Quantized weights are no plain tensors: packed parameters come out of a state dict as tuples, torchao's are wrappers
    around several tensors, and a module's extra state can be anything. What cannot be taken apart is refused with a
    ``ModelError``: bytes that nobody hashes would let two models share a cache.
    """
    if isinstance(value, torch.Tensor):
        yield from _of_tensor(name, value)
    elif isinstance(value, Whole) or value is None or isinstance(value, bool | int | str):
        yield name, value
    elif isinstance(value, float):
        yield name, value.hex()  # JSON has no NaN
    elif isinstance(value, torch.dtype | torch.layout | torch.memory_format | torch.qscheme | type):
        yield name, str(value)
    elif isinstance(value, torch.device):
        return  # where numbers lie is no part of them
    elif isinstance(value, bytes | bytearray | io.BytesIO):
        data = value.getvalue() if isinstance(value, io.BytesIO) else bytes(value)
        yield name, torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
    elif isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        yield name, torch.from_numpy(np.array(value))
    elif isinstance(value, Mapping | list | tuple):
        yield name, len(value)
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(f"{name}.{key}", item)
    elif isinstance(value, enum.Enum):
        yield name, f"{type(value).__name__}.{value.name}"
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield name, type(value).__name__
        for field in dataclasses.fields(value):
            yield from leaves(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, torch.ScriptObject):
        try:
            state = value.__getstate__()
        except (AttributeError, RuntimeError):  # its class cannot be saved
            raise _unknown(name, value) from None
        yield from leaves(name, state)
    else:
        raise _unknown(name, value)


def _of_tensor(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Leaf]]:
    if tensor.is_meta:
        raise without_bytes(name)
    if hasattr(tensor, "full_tensor"):
        raise ModelError(
            f"weight {name} is distributed over several processes: make the recycler from a model that is whole "
            "(before it is sharded)"
        )
    if is_traceable_wrapper_subclass(tensor):
        inner, context = tensor.__tensor_flatten__()
        yield name, f"{type(tensor).__name__} {list(tensor.shape)} {tensor.dtype}"
        for attribute in inner:
            yield from leaves(f"{name}.{attribute}", getattr(tensor, attribute))
        yield from leaves(f"{name}.context", context)
        return
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or is_lazy(tensor):
        raise _unknown(name, tensor)
    with torch.no_grad():
        plain = tensor.detach()
        if plain.is_nested or plain.is_mkldnn:
            raise _unknown(name, plain)
        if plain.layout != torch.strided:  # COO, CSR, ...: the same numbers have one dense form
            yield name, str(plain.layout)
            yield f"{name}.dense", plain.to_dense()
        elif plain.is_quantized:
            yield from _of_quantized(name, plain)
        else:
            yield name, plain.as_subclass(torch.Tensor).resolve_conj().resolve_neg()


def _of_quantized(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Leaf]]:
    yield name, f"{tensor.dtype} {tensor.qscheme()}"
    yield f"{name}.values", tensor.int_repr()
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        yield f"{name}.scale", tensor.q_scale().hex()
        yield f"{name}.zero_point", tensor.q_zero_point()
    else:
        yield f"{name}.scales", tensor.q_per_channel_scales()
        yield f"{name}.zero_points", tensor.q_per_channel_zero_points()
        yield f"{name}.axis", tensor.q_per_channel_axis()


def _unknown(name: str, value: Any) -> ModelError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return ModelError(
        f"{name} of the lower half is a {kind}, whose bytes cannot be told, so two models that differ in it would "
        "share one cache: give a model whose lower half is made of tensors (model.dequantize() makes them)"
    )
