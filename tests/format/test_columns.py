"""Records of the caller's own columns, and what is refused of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actcache.errors import FormatError, ShapeError, UsageError
from actcache.format.columns import Schema, as_arrays

_DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(),
    hnp.complex_number_dtypes(sizes=(64, 128)),
    hnp.unicode_string_dtypes(max_len=5),
    hnp.byte_string_dtypes(max_len=5),
    hnp.datetime64_dtypes(),
)


@st.composite
def columns(draw):
    tokens = draw(st.integers(0, 5))
    names = draw(st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,5}z", fullmatch=True), min_size=1, max_size=4, unique=True))
    shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
    return tokens, {name: draw(hnp.arrays(draw(_DTYPES), (tokens, *draw(shapes)))) for name in names}


@given(columns())
def test_what_is_packed_comes_back(given_columns):
    tokens, arrays = given_columns
    schema = Schema.of(arrays)
    packed = schema.pack(arrays, tokens)
    assert packed.shape == (tokens, schema.width)
    found = schema.unpack(packed)
    assert list(found) == sorted(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype.newbyteorder("<")
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()
    again = Schema.loads(schema.dumps(), "x")
    assert again == schema
    # Without actcache: NumPy's own record.
    record = np.dtype([(name, np.dtype(dtype), shape) for name, dtype, shape in again.fields])
    assert record.itemsize == schema.width


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_schema_is_refused(at, by):
    schema = Schema.of({"mask": np.zeros(1, bool), "weights": np.zeros((1, 2), np.float32)})
    data = bytearray(schema.dumps().rstrip())
    data[at % len(data)] ^= by
    try:
        found = Schema.loads(bytes(data), "x")
    except FormatError:
        return
    assert found == schema  # a blank, say


def test_what_does_not_fit_is_refused():
    ones = np.ones(3)
    for arrays, said in (
        ({"token_ids": ones}, "name of the package's own"),
        ({"values": ones}, "name of the package's own"),
        ({"": ones}, "a column's name is a word"),
        ({"a b": ones}, "a column's name is a word"),
        ({3: ones}, "a column's name is a word"),
        ({"x": np.array(["a", None, 3], object)}, "holds object"),
        ({"x": np.zeros(3, [("a", "f4")])}, "one fixed size"),
        ({"x": np.zeros((3, 0))}, "0 bytes a token"),
        ({"x": np.zeros((3, 10**5))}, "800000 bytes a token"),
        ({f"x{n}": ones for n in range(65)}, "65 columns"),
    ):
        with pytest.raises(UsageError, match=said):
            Schema.of(arrays)
    for given_columns in ({}, None, [1]):
        with pytest.raises(UsageError, match="mapping"):
            as_arrays(given_columns)
    with pytest.raises(ShapeError, match="not one number"):
        as_arrays({"x": 3})
    schema = Schema.of({"mask": np.zeros(1, np.uint8), "weights": np.zeros((1, 2), np.float32)})
    good = {"mask": [1, 0, 1], "weights": np.zeros((3, 2))}
    assert schema.pack(as_arrays(good), 3).shape == (3, 9)
    for change, error, said in (
        ({"mask": [1, 0]}, ShapeError, "document 5: column mask must be .3., not .2."),
        ({"mask": [1, 0, 256]}, ShapeError, "does not fit uint8"),
        ({"mask": [1, 0, 0.5]}, ShapeError, "does not fit uint8"),
        ({"weights": np.zeros((3, 3))}, ShapeError, "must be .3, 2."),
        ({"more": [1, 2, 3]}, UsageError, "own columns are mask, weights, not mask, more, weights"),
    ):
        with pytest.raises(error, match=said):
            schema.pack(as_arrays({**good, **change}), 3, "document 5")
