"""What is put as tensors of any kind comes back as the numbers that it holds, or is refused by name."""

from __future__ import annotations

import warnings

import numpy as np
import pandas
import pytest
import torch

import actcache
from actcache.errors import ShapeError
from tests.support import HIDDEN, key, recipe, rows
from tests.support.backends import each

# Exact in every dtype below; zeros, for sparse ones.
VALUES = (np.arange(4 * HIDDEN).reshape(4, HIDDEN) % 5 - 2).astype(np.float32)
T = torch.from_numpy(VALUES)


@pytest.fixture(scope="module")
def tensors():
    """The same numbers as tensors of every kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some kinds are in beta
        csr, quantized = T.to_sparse_csr(), torch.quantize_per_tensor(T, 0.5, 0, torch.qint8)
    with torch.inference_mode():
        inference = T * 1
    return {
        "float8_e4m3": T.to(torch.float8_e4m3fn),
        "float8_e5m2": T.to(torch.float8_e5m2),
        "float16": T.half(),
        "bfloat16": T.bfloat16(),
        "float64": T.double(),
        "sparse coo": T.to_sparse(),
        "sparse csr": csr,
        "sparse bfloat16": T.bfloat16().to_sparse(),
        "negative bit": torch._neg_view(-T),
        "negative bit, bfloat16": torch._neg_view(-T.bfloat16()),
        "of a conjugate": torch.complex(T, -T).conj().imag,
        "requires grad": T.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(T),
        "not contiguous": T.T.contiguous().T,
        "strided": torch.stack([T, T], dim=1).reshape(8, HIDDEN)[::2],
        "quantized": quantized,
        "mkldnn": T.to_mkldnn() if torch.backends.mkldnn.is_available() else T,
        "inference": inference,
    }


@pytest.fixture(scope="module")
def refused():
    """What is put, and why it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([T, T[:1]])
        jagged = torch.nested.nested_tensor([T, T[:1]], layout=torch.jagged)
    return [
        (T.to("meta"), "meta device"),
        (torch.complex(T, T).conj(), "floating point, not complex64"),
        (T.long(), "floating point, not int64"),
        (T > 0, "floating point, not bool"),
        (nested, "cannot be read as an array"),
        (jagged, "jagged cannot be read as an array"),
        (torch.zeros(4, HIDDEN, dtype=torch.uint8).view(torch.bits8), "bits8 .* cannot be read as an array"),
        (np.ma.masked_array(VALUES, VALUES == 0), "masked array"),
        ((row for row in VALUES), "a generator is no array"),
        (None, "a NoneType is no array"),
    ]


@each()
def test_tensors_of_every_kind(kind, tmp_path, tensors, refused):
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        names = [actcache.document_key(name) for name in tensors]
        ids = [torch.arange(4, dtype=torch.int32), *[torch.arange(4)] * (len(names) - 1)]
        space.put(names, list(tensors.values()), ids)
        space.flush()
        for name, entry in zip(tensors, space.get(names), strict=True):
            np.testing.assert_array_equal(entry.activations, VALUES, err_msg=name)
            assert entry.token_ids.tolist() == [0, 1, 2, 3]
        for tensor, why in refused:
            with pytest.raises(ShapeError, match=f"document {key(0).hex()}: .*{why}"):
                space.put([key(0)], [tensor])
        assert key(0) not in space


def test_dtypes_of_token_ids(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        for number, dtype in enumerate((torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16)):
            ids = torch.tensor([1, 2, 3, 4], dtype=torch.int64).to(dtype)
            space.put([key(number)], [T], [ids], word_ids=[ids])
            (entry,) = space.get([key(number)])
            assert entry.token_ids.tolist() == entry.extras["word_ids"].tolist() == [1, 2, 3, 4]
        for bad in (torch.tensor([True] * 4), torch.tensor([1.0] * 4), torch.zeros(4, dtype=torch.long, device="meta")):
            with pytest.raises(ShapeError):
                space.put([key(9)], [T], [bad])


def test_arrays_of_any_container_go_by_position(tmp_path):
    """A Series that was filtered or shuffled keeps its labels; ``series[0]`` is another row than the first."""
    numbers = [2, 0, 1]
    series = pandas.Series([rows(n) for n in range(3)])[numbers]
    token_ids = pandas.Series([np.full(len(rows(n)), n) for n in range(3)])[numbers]
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        keys = [key(n) for n in numbers]
        space.put(keys, series, token_ids)
        space.put([key(10), key(11)], (rows(n) for n in (10, 11)))
        space.put([key(20), key(21)], torch.stack([T, T + 1]))
        found = space.get([*keys, key(10), key(11)])
        for number, entry in zip([*numbers, 10, 11], found, strict=True):
            np.testing.assert_array_equal(entry.activations, rows(number))
            assert number > 9 or set(entry.token_ids.tolist()) == {number}
        np.testing.assert_array_equal(space.get([key(21)])[0].activations, VALUES + 1)
        with pytest.raises(ShapeError, match="give a list of arrays"):
            space.put([key(30)], 5.0)


def test_buffers_that_cannot_be_written_into(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.put([key(0)], [VALUES])
        for out in (torch._neg_view(T.clone()), T.to_sparse(), T.to(torch.float8_e4m3fn), T.to("meta")):
            with pytest.raises(ShapeError):
                space.read_into([key(0)], out)
        out = torch.zeros(4, HIDDEN, requires_grad=True)
        space.read_into([key(0)], out)
        assert torch.equal(out.detach(), T)
