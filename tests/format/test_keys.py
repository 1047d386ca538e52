"""Keys are a stored format: golden digests, made by the code beside them and not by actcache."""

from __future__ import annotations

import hashlib
import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache import document_key, windows
from actcache.errors import ActcacheError, DocumentError, KeyFormatError
from actcache.format.keys import key_array, key_list


def independent(kind: bytes, *parts: bytes) -> bytes:
    """Format version 1, from docs/format.md: BLAKE2b-256, personalized by kind, over length-prefixed parts."""
    data = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    return hashlib.blake2b(data, digest_size=32, person=b"actcache/" + kind).digest()


GOLDEN = [
    ("hello", "088c3d2a7007f6c9153ec664eb0946158f4f3445ea3e8343eee697e074f8f3f2"),
    ("Größe 🤗", "d3a1116d1d43ec285514eabc35631a452bae7ffa523795a003ba3fceccede471"),
    (("a", "bc"), "87cda0a55f672ee7ccf0d33efefaafe503c4b58a8dd048b9ea675600931f1752"),
    (["a", "bc"], "1e76a7e860bcc7b58e02930f8237b0856b19b24dab8207fe0ac682048ca99000"),
    ([101, 7592, 102], "6a58af799586c15102e3e345609e3565236e81c3b195a219c38641ed7b51e62c"),
]


@pytest.mark.parametrize(("document", "digest"), GOLDEN)
def test_golden_digests(document, digest):
    assert document_key(document).hex() == digest


def test_golden_window():
    digest = windows(512, 128).key(bytes(range(32)), 3, last=True).hex()
    assert digest == "b245be6672418a91788e141e29cec88cc1af2d2428dd6bf86448c7349263cd03"


def test_against_independent_code():
    assert document_key("hello") == independent(b"text", b"hello")
    assert document_key(("a", "")) == independent(b"pair", b"a", b"")
    assert document_key(["a", "b", "c"]) == independent(b"words", b"a", b"b", b"c")
    assert document_key([1, 2]) == independent(b"ids", struct.pack("<2q", 1, 2))
    expected = independent(b"window", bytes(32), struct.pack("<4q", 512, 128, 3, 0))
    assert windows(512, 128).key(bytes(32), 3, last=False) == expected


def test_kinds_have_domains_of_their_own():
    alike = ["ab", ("ab", ""), ("", "ab"), ["ab"], ["a", "b"], ("a", "b"), [97, 98], [0x6261], ["ab", ""], ["", "ab"]]
    keys = [document_key(document) for document in alike]
    keys += windows(2).keys(keys[0], 2) + windows(2, 1).keys(keys[0], 2) + windows(2).keys(keys[1], 2)
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 for key in keys)


@given(st.lists(st.text(max_size=3), min_size=1, max_size=4), st.lists(st.text(max_size=3), min_size=1, max_size=4))
def test_words_are_length_prefixed(first, second):
    assert (document_key(first) == document_key(second)) == (first == second)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_token_ids_of_any_container_are_the_same(numbers):
    expected = independent(b"ids", struct.pack(f"<{len(numbers)}q", *numbers))
    assert document_key(numbers) == expected
    assert document_key(tuple(numbers)) == expected
    assert document_key(np.array(numbers, np.uint64)) == expected
    if max(numbers) < 2**31:
        assert document_key(np.array(numbers, ">i4")) == expected
        assert document_key(np.array(numbers * 2, np.int32)[: len(numbers)]) == expected


def test_a_range_and_strided_arrays_are_token_ids():
    assert document_key(range(3)) == document_key([0, 1, 2])
    assert document_key(np.arange(6)[::2]) == document_key([0, 2, 4])


@pytest.mark.parametrize(
    "bad",
    [
        "",
        ("", ""),
        [],
        (),
        b"bytes",
        bytearray(b"x"),
        memoryview(b"abc"),
        None,
        5,
        1.5,
        {"a"},
        {"a": 1},
        iter("ab"),
        ["a", 1],
        [1, "a"],
        [1.5],
        [True, False],
        [None],
        [[1, 2]],
        [[1], [2, 3]],
        [-1],
        [2**63],
        [2**64],
        [-1, 2**63],
        np.array(5),
        np.ones((2, 2), np.int64),
        np.array([1.0]),
        np.array([True]),
        np.array([], np.int64),
        np.array([1], object),
        "lone \ud800 surrogate",
        ("fine", "\udfff"),
        ["fine", "\udc80"],
    ],
)
def test_what_is_no_document(bad):
    with pytest.raises(DocumentError):
        document_key(bad)


def test_text_is_taken_as_it_is():
    forms = ["e\u0301", "\u00e9", "a\r\nb", "a\nb", " a", "a", "A", "\0", "\0\0"]
    assert len({document_key(form) for form in forms}) == len(forms)


def test_windows():
    document = document_key("long")
    keys = windows(512, 128).keys(document, 3)
    assert keys == [windows(512, 128).key(document, n, last=n == 2) for n in range(3)]
    others = [windows(512, 127), windows(511, 128), windows(512)]
    every = [keys, windows(512, 128).keys(document, 4), windows(512, 128).keys(document_key("x"), 3)]
    every += [spec.keys(document, 3) for spec in others]
    flat = list(itertools.chain(*every))
    # Of 3 and of 4 windows, the first two are the same: only the last one says where the document ends.
    assert len(flat) - len(set(flat)) == 2
    assert windows(512).keys(document, 0) == []


@pytest.mark.parametrize(("length", "stride"), [(0, 0), (-1, 0), (4, 4), (4, 5), (4, -1)])
def test_windows_that_do_not_move(length, stride):
    with pytest.raises(DocumentError):
        windows(length, stride)


def test_key_arrays():
    keys = [document_key(str(n)) for n in range(5)]
    assert key_list(key_array(keys)) == keys
    assert key_list(key_array(key for key in keys)) == keys  # an iterator is not used up by the check
    assert key_list(key_array(key_array(keys))) == keys
    assert key_list(key_array(key_array(keys)[::2])) == keys[::2]
    assert key_array([]).shape == (0, 32)


@pytest.mark.parametrize(
    "bad",
    [
        b"x" * 32,
        "x" * 32,
        [b"x" * 31],
        [b"x" * 33],
        [b"x" * 32, "x" * 32],
        [None],
        [5],
        np.zeros((2, 31), np.uint8),
        np.zeros((2, 32), np.int8),
        np.zeros(32, np.uint8),
        [bytearray(32)],
    ],
    ids=lambda bad: ascii(bad)[:30],
)
def test_what_is_no_list_of_keys(bad):
    with pytest.raises(KeyFormatError) as caught:
        key_array(bad)
    assert isinstance(caught.value, ActcacheError)
