"""Texts as users have them: tables, columns, iterators, arrays, tensors; wherever texts are taken."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

import actcache
from actcache import Recyclers
from actcache.admin.forecast import forecast
from actcache.admin.lost import of_documents
from actcache.errors import DocumentError, UsageError
from actcache.models.chats import encode_chats
from actcache.models.parallel import fill as fill_parallel
from actcache.models.training.joint import read_jointly
from actcache.models.training.sweep import sweep
from actcache.models.vocabulary import count_vocabulary
from tests.support.tiny import save_tiny

TEXTS = ["a b", "c d e", "f"]
FRAME = pandas.DataFrame({"text": TEXTS, "label": [0, 1, 0]})
DATASET = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0]})
TABLE = pyarrow.table({"text": TEXTS, "label": [0, 1, 0]})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    return AutoModel.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def recyclers(loaded: tuple[Any, Any], tmp_path: Path) -> Iterator[Recyclers]:
    with Recyclers(*loaded, layers=[2, 3], store=tmp_path / "store", dtype="float32") as made:
        yield made


@pytest.fixture(scope="module")
def nothing_stored(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recyclers]:
    """For tests in which nothing may be stored, which they assert."""
    with Recyclers(*loaded, layers=[2, 3], store=tmp_path_factory.mktemp("store"), dtype="float32") as made:
        yield made


Use = Callable[[Any], Any]


@pytest.fixture(scope="module")
def task(tiny: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=2).eval()


@pytest.fixture
def uses(recyclers: Recyclers, tiny: Path, task: Any, tmp_path: Path) -> dict[str, Use]:
    """Every way to give texts."""
    one = recyclers[2]
    store = str(tmp_path / "store")
    return {
        "fill": lambda texts: one.fill(texts, progress=False),
        "fill several": lambda texts: recyclers.fill(texts, progress=False),
        "fill by processes": lambda texts: fill_parallel(
            texts, tiny, devices=["cpu"], store=store, layers=[2], progress=False
        ),
        "reader": one.reader,
        "reader, computing": lambda texts: one.reader(texts, on_missing="compute"),
        "keys": one.keys,
        "verify": lambda texts: one.verify(texts=texts),
        "regime NR": lambda texts: one.regime("NR", task, texts),
        "regime R": lambda texts: one.regime("R", task, texts),
        "jointly": lambda texts: read_jointly(recyclers, texts),
        "sweep": lambda texts: sweep(recyclers, task, texts, [0, 1, 0], held_out=[0]),
        "count": lambda texts: count_vocabulary(texts, one.agreement.encoder.tokenizer),
        "forecast": lambda texts: forecast(store, texts, str(tiny), layers=[2]),
        "recompute": lambda texts: of_documents(one.space, one.agreement.encoder, texts, {}),
    }


class Polars:
    """As a Polars DataFrame looks from outside; the library is none that the tests need."""

    columns = ("label", "text")

    def __iter__(self) -> Iterator[Any]:
        return iter([[0, 1, 0], TEXTS])


NO_TEXTS: dict[str, tuple[Callable[[], Any], str]] = {
    "DataFrame": (lambda: FRAME, r"this DataFrame is a table.*texts\['text'\].*'label'"),
    "a frame of one column": (lambda: FRAME[["label"]], r"texts\['label'\]"),
    "its values": (lambda: FRAME[["text"]].to_numpy(), r"texts\[:, 0\]"),
    "Polars": (Polars, r"this Polars is a table.*texts\['text'\]"),
    "records": (lambda: FRAME.to_records(), r"is a table.*texts\['text'\]"),
    "Table": (lambda: TABLE, r"this Table is a table.*texts\['text'\]"),
    "RecordBatch": (lambda: TABLE.to_batches()[0], r"texts\['text'\]"),
    "Dataset": (lambda: DATASET, r"this Dataset is a table.*texts\['text'\]"),
    "IterableDataset": (DATASET.to_iterable_dataset, r"texts\['text'\]"),
    "DatasetDict": (lambda: datasets.DatasetDict({"train": DATASET}), r"not a DatasetDict: .*texts\['train'\]"),
    "BatchEncoding": (lambda: BatchEncoding({"input_ids": [[5]]}), r"texts\['input_ids'\]"),
    "dict": (lambda: {"text": TEXTS}, r"not a dict: one of its values, such as texts\['text'\]"),
    "set": (lambda: set(TEXTS), "this set has no order"),
    "one text": (lambda: "a text", "not one text"),
    "bytes": (lambda: b"a text", "not one text"),
    "Path": (lambda: Path("corpus.txt"), r"corpus\.txt is a path"),
    "file": (lambda: io.StringIO("a\nb\n"), "an open file"),
    "DataLoader": (lambda: DataLoader(TEXTS, batch_size=2), "this DataLoader gives batches"),
    "None": (lambda: None, "not a NoneType"),
    "number": (lambda: 5, "not a int"),
    "0-d array": (lambda: np.array("a text", object), "not a ndarray"),
    "function": (lambda: lambda: TEXTS, "not a function: call it"),
    "used up": (lambda: used_up(), "the generator gave no documents: it was used up before"),
    "map": (lambda: map(str, []), "the map gave no documents"),
}


def used_up() -> Iterator[str]:
    generator = (text for text in TEXTS)
    assert list(generator) == TEXTS
    return generator


def test_what_is_no_list_of_documents_is_refused_everywhere(uses: dict[str, Use], recyclers: Recyclers) -> None:
    # An empty corpus of a repair is none that anybody went through: it is made anew each time.
    fine = {("recompute", "used up"), ("recompute", "map"), ("verify", "None")}
    for place, use in uses.items():
        for name, (make, why) in NO_TEXTS.items():
            if (place, name) in fine:
                continue
            with pytest.raises(UsageError, match=why):
                use(make())
    of_documents(recyclers[2].space, recyclers[2].agreement.encoder, used_up(), {})
    assert not len(recyclers[2].space)
    assert not len(recyclers[3].space)


TEXTS_OF_USERS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "Series": lambda: FRAME["text"],
    "Series of objects": lambda: FRAME["text"].astype(object),
    "Series of another index": lambda: FRAME["text"].set_axis([2, 0, 1]),
    "Column": lambda: DATASET["text"],
    "IterableColumn": lambda: DATASET.to_iterable_dataset()["text"],
    "object array": lambda: np.array(TEXTS, object),
    "array of str": lambda: np.array(TEXTS),
    "np.str_": lambda: [np.str_(text) for text in TEXTS],
    "StringDType": lambda: np.array(TEXTS, np.dtypes.StringDType()),
    "ChunkedArray": lambda: TABLE["text"],
    "Arrow array": lambda: pyarrow.array(TEXTS, pyarrow.large_string()),
    "enum": lambda: list(Enum("E", {f"T{i}": text for i, text in enumerate(TEXTS)}, type=str)),
    "keys of a dict": lambda: dict.fromkeys(TEXTS).keys(),
    "values of a dict": lambda: dict(enumerate(TEXTS)).values(),
}


@pytest.mark.parametrize("name", TEXTS_OF_USERS)
def test_columns_and_iterators_of_texts(recyclers: Recyclers, name: str) -> None:
    make = TEXTS_OF_USERS[name]
    wanted = [actcache.document_key(text) for text in TEXTS]
    assert recyclers[2].keys(make()) == wanted
    recyclers.fill(make(), progress=False)
    assert sorted(recyclers[2].space.keys()) == sorted(wanted)
    (batch,) = recyclers[2].reader(make(), labels=[0, 1, 0])
    assert batch.documents.tolist() == [0, 1, 2]
    recyclers[2].verify(texts=make())


def test_none_on_purpose(recyclers: Recyclers) -> None:
    assert recyclers.fill([], progress=False).documents == 0
    assert len(recyclers[2].reader([])) == 0
    assert len(recyclers[2].reader(np.empty(0, object))) == 0
    assert count_vocabulary([], recyclers[2].agreement.encoder.tokenizer).documents == 0


def test_one_generator_for_two_fills(recyclers: Recyclers) -> None:
    texts = (text for text in TEXTS)
    assert recyclers[2].fill(texts, progress=False).computed == 3
    with pytest.raises(UsageError, match="used up"):
        recyclers[2].fill(texts, progress=False)
    labels = iter([0, 1, 0])
    with pytest.raises(UsageError, match="no array"):
        recyclers[2].reader(TEXTS, labels=labels)


IDS = [7, 8, 9]
DOCUMENTS: dict[str, tuple[Any, Any]] = {
    "int32 tensor": (torch.tensor(IDS, dtype=torch.int32), IDS),
    "int64 tensor": (torch.tensor(IDS), IDS),
    "uint8 tensor": (torch.tensor(IDS, dtype=torch.uint8), IDS),
    "list of tensors": ([torch.tensor(one) for one in IDS], IDS),
    "list of np.int64": ([np.int64(one) for one in IDS], IDS),
    "tuple": (tuple(IDS), IDS),
    "big-endian": (np.array(IDS, ">i4"), IDS),
    "strided": (np.array([IDS, IDS]).T[:, 0], IDS),
    "Arrow list": (pyarrow.array([IDS])[0], IDS),
    "words in an array": (np.array(["a", "b"], object), ["a", "b"]),
    "words in an array of str": (np.array(["a", "b"]), ["a", "b"]),
    "list of np.str_": ([np.str_("a"), "b"], ["a", "b"]),
    "Arrow words": (pyarrow.array([["a", "b"]])[0], ["a", "b"]),
    "pair of np.str_": ((np.str_("a"), np.str_("b")), ("a", "b")),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_of_any_container(recyclers: Recyclers, name: str) -> None:
    given, plain = DOCUMENTS[name]
    one = recyclers[2]
    assert one.keys([given]) == one.keys([plain])
    one.fill([given], progress=False)
    mine, theirs = one.agreement.encoder.encode([given, plain])
    np.testing.assert_array_equal(mine[0].token_ids, theirs[0].token_ids)
    np.testing.assert_array_equal(one.space.get(one.keys([plain]))[0].token_ids, theirs[0].token_ids)
    assert one.verify(texts=[given]).ok


def test_a_matrix_of_token_ids(recyclers: Recyclers) -> None:
    for matrix in (np.array([IDS, IDS[::-1]]), torch.tensor([IDS, IDS[::-1]])):
        assert recyclers[2].keys(matrix) == recyclers[2].keys([IDS, IDS[::-1]])


class Text(str, Enum):  # noqa: UP042
    """Prints in another way than it reads."""

    A = "a b"


def test_a_subclass_of_str_is_its_text(recyclers: Recyclers) -> None:
    assert str(Text.A) != "a b"
    for mine, plain in ((Text.A, "a b"), ((Text.A, "c"), ("a b", "c")), ([Text.A, "c"], ["a b", "c"])):
        assert recyclers[2].keys([mine]) == recyclers[2].keys([plain])
        encoded, other = recyclers[2].agreement.encoder.encode([mine, plain])
        assert encoded[0].token_ids.tolist() == other[0].token_ids.tolist()


NO_DOCUMENTS = {
    "None": (None, r"a missing value \(None\)"),
    "NaN": (float("nan"), r"a missing value \(nan\)"),
    "np.nan": (np.float32("nan"), "a missing value"),
    "NA": (pandas.NA, "a missing value"),
    "NaT": (pandas.NaT, "a missing value"),
    "Arrow null": (pyarrow.scalar(None, pyarrow.string()), r"a missing value \(None\)"),
    "dict": ({"text": "a"}, r"a dict is no document; give one of its values \('text'\)"),
    "Path": (Path("corpus.txt"), r"a path \(corpus\.txt\) is no document"),
    "bytes": (b"a", "decode it"),
    "np.bytes_": (np.bytes_(b"a"), "decode it"),
    "number": (5, r"one token id \(5\)"),
    "np.int64": (np.int64(5), r"one token id \(5\)"),
    "0-d tensor": (torch.tensor(5), r"one-dimensional, and this document is \[\]"),
    "matrix": (torch.tensor([IDS]), r"one-dimensional, and this document is \[1, 3\]"),
    "three texts": (("a", "b", "c"), "a pair, and this one has 3"),
    "one text of a cursor": (("a",), "a pair, and this one has 1"),
    "a text and a missing one": (("a", None), "NoneType, str"),
    "words and None": (["a", None], "NoneType, str"),
    "words and NaN": (np.array(["a", float("nan")], object), "holds object"),
    "words of bytes": ([b"a", b"b"], "values of bytes"),
    "nested": ([["a"]], "values of list"),
    "truth values": ([True, False], "values of bool"),
    "a truth value among ids": ([5, True], "values of bool, int"),
    "bool tensor": (torch.tensor([True]), "holds bool"),
    "float tensor": (torch.tensor([1.0]), "holds float32"),
    "meta tensor": (torch.tensor([1], device="meta"), "meta device"),
    "surrogate": ("a\ud800", "lone surrogate at character 1"),
    "surrogate in a word": (["a", "\udfff"], "lone surrogate"),
    "Series": (FRAME["text"], "a Series is no document"),
    "set": ({"a"}, "a set is no document"),
}


@pytest.mark.parametrize("name", NO_DOCUMENTS)
def test_what_is_no_document_is_named_by_its_position(nothing_stored: Recyclers, task: Any, name: str) -> None:
    bad, why = NO_DOCUMENTS[name]
    one, texts = nothing_stored[2], ["a", "b", bad]
    for use in (
        lambda: one.fill(texts, progress=False),
        lambda: one.reader(texts),
        lambda: one.reader(iter(texts), on_missing="compute"),
        lambda: one.keys(texts),
        lambda: one.regime("NR", task, texts),
        lambda: count_vocabulary(texts, one.agreement.encoder.tokenizer),
        lambda: one.verify(texts=texts),
    ):
        with pytest.raises(DocumentError, match=rf"(position|document) 2\b.*({why})"):
            use()
    assert not len(one.space)


ROWS = [{"text": text, "other": f"{text}!"} for text in TEXTS]
TABLES: dict[str, Callable[[], Any]] = {
    "DataFrame": lambda: FRAME.assign(other=[f"{text}!" for text in TEXTS]),
    "Table": lambda: pyarrow.table({"text": TEXTS, "other": [f"{text}!" for text in TEXTS]}),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "generated": lambda: datasets.IterableDataset.from_generator(lambda: iter(ROWS)),  # knows no columns
    "mapping": lambda: {"text": TEXTS, "other": [f"{text}!" for text in TEXTS]},
    "rows": lambda: ROWS,
    "generator": lambda: iter(ROWS),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_field_of_a_data_set(recyclers: Recyclers, name: str) -> None:
    make = TABLES[name]
    one = recyclers[2]
    wanted, pairs = one.keys(TEXTS), one.keys([(text, f"{text}!") for text in TEXTS])
    assert one.keys(make(), field="text") == wanted
    assert one.fill(make(), field="text", progress=False).computed == len(set(wanted))
    assert one.keys(make(), field=("text", "other")) == pairs
    recyclers.fill(make(), field=("text", "other"), progress=False)
    assert sorted(recyclers[3].space.keys()) == sorted(set(pairs))
    (batch,) = one.reader(make(), field="text", labels=[0, 1, 0])
    assert batch.keys == wanted
    with pytest.raises(UsageError, match=r"no (column )?'missing'"):
        one.fill(make(), field="missing", progress=False)
    for field in ((), ("text", "other", "text"), 3):
        with pytest.raises(UsageError, match="field is a column's name"):
            one.fill(make(), field=field, progress=False)


def test_a_field_of_what_has_none(recyclers: Recyclers) -> None:
    for given, why in ((TEXTS, "row 0 has no 'text': it is a str"), ("a text", "not one text"), (None, "NoneType")):
        with pytest.raises(UsageError, match=why):
            recyclers[2].fill(given, field="text", progress=False)


def test_ids_formatted_as_tensors(recyclers: Recyclers) -> None:
    """Wherever a data set's numbers are: torch, NumPy, Arrow, Python."""
    plain = datasets.Dataset.from_dict({"input_ids": [IDS, IDS[::-1]]})
    keys = [actcache.document_key(IDS), actcache.document_key(IDS[::-1])]
    for kind in (None, "torch", "numpy", "arrow", "pandas"):
        assert recyclers[2].keys(plain.with_format(kind), field="input_ids") == keys
    rows = plain.with_format("torch")
    assert [actcache.document_key(row["input_ids"]) for row in rows] == keys


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}"
    "{{ m['role'] }} : {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} ."
    "{% endgeneration %}{% else %}{{ m['content'] }} .{% endif %}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a cat"}],
    [{"role": "user", "content": "say more"}, {"role": "assistant", "content": "no"}, {"role": "user", "content": "x"}],
]


def test_chats(recyclers: Recyclers, tiny: Path) -> None:
    """What the assistant said is marked, and a conversation is found by its tokens."""
    one = recyclers[2]
    tokenizer = one.agreement.encoder.tokenizer
    with pytest.raises(UsageError, match="no chat template"):
        one.chats(CHATS)
    tokenizer.chat_template = TEMPLATE
    chats = one.chats(datasets.Dataset.from_dict({"messages": CHATS}), field="messages")
    said = [tokenizer.decode(ids[mask]) for ids, mask in zip(chats.token_ids, chats.loss_masks, strict=True)]
    assert [text.replace(" ", "") for text in said] == ["acat.", "no."]
    one.fill(chats.token_ids, progress=False)
    assert one.space.get(one.keys([chats.token_ids[1].tolist()]))[0].token_ids.tolist() == chats.token_ids[1].tolist()
    cut = encode_chats(tokenizer, CHATS, max_length=7)
    assert [len(ids) for ids in cut.token_ids] == [len(mask) for mask in cut.loss_masks] == [7, 7]
    for wrong in (["hello"], [[]], [None], [{"role": "user"}]):
        with pytest.raises(DocumentError, match="position 0 is no conversation"):
            one.chats(wrong)
    with pytest.raises(DocumentError, match=r"position 1: the chat template refuses .*nobody speaks"):
        one.chats([CHATS[0], [{"role": "nobody", "content": "x"}]])
    tokenizer.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(UsageError, match="does not mark what the assistant says"):
        one.chats(CHATS)


MASKED = [
    {"ids": (IDS * 3)[:n], "mask": [i % 2 == 0 for i in range(n)], "weight": [n + i / 8 for i in range(n)]}
    for n in (5, 3, 7)
]
MASKED.append({**MASKED[1], "mask": [False] * 3})  # given twice: the first one's count
BESIDE: dict[str, Callable[[], Any]] = {
    "DataFrame": lambda: pandas.DataFrame(MASKED),
    "Table": lambda: pyarrow.Table.from_pylist(MASKED),
    "Dataset": lambda: datasets.Dataset.from_list(MASKED),
    "torch": lambda: datasets.Dataset.from_list(MASKED).with_format("torch"),
    "IterableDataset": lambda: datasets.Dataset.from_list(MASKED).to_iterable_dataset(),
    "mapping": lambda: {name: [row[name] for row in MASKED] for name in MASKED[0]},
    "generator": lambda: iter(MASKED),
}


@pytest.mark.parametrize("name", BESIDE)
def test_fields_that_stand_beside_the_tokens(recyclers: Recyclers, name: str) -> None:
    make, keys = BESIDE[name], [actcache.document_key(row["ids"]) for row in MASKED[:3]]
    columns = {"loss_mask": "mask", "weight": "weight"}
    if name == "Dataset":
        assert recyclers.fill(make(), field="ids", columns=columns, progress=False).computed == 3
    else:
        assert recyclers[2].fill(make(), field="ids", columns=columns, progress=False).computed == 3
    for space in [one.space for one in (recyclers[2], recyclers[3]) if len(one.space)]:
        for row, entry in zip(MASKED, space.get(keys), strict=False):
            np.testing.assert_array_equal(entry.token_ids, row["ids"])
            np.testing.assert_array_equal(entry.columns["loss_mask"], row["mask"])
            np.testing.assert_array_equal(entry.columns["weight"], row["weight"])
            assert entry.columns["loss_mask"].dtype == bool
    assert recyclers[2].fill(make(), field="ids", columns=columns, progress=False).computed == 0
    with pytest.raises(UsageError, match="own columns are loss_mask, weight"):
        recyclers[2].fill(make(), field="ids", columns=["mask"], progress=False)


def test_columns_that_do_not_fit(recyclers: Recyclers) -> None:
    one = recyclers[2]
    for columns, why in (
        (["gone"], "'gone'"),
        ("mask", "names of fields"),
        ({}, "names of fields"),
        ({"a": 3}, "names of"),
        (3, "names of"),
        (["mask", 3], "names of"),
    ):
        with pytest.raises(UsageError, match=why):
            one.fill(MASKED, field="ids", columns=columns, progress=False)
    with pytest.raises(UsageError, match="field="):
        one.fill([IDS], columns=["mask"], progress=False)
    for bad, why in (([True], r"the shape \[1\]"), (["a", [1]], "no array"), (None, "no array")):
        rows = [MASKED[0], {**MASKED[1], "mask": bad}]
        with pytest.raises(DocumentError, match=rf"position 1 of the texts: column mask has {why}.*3 tokens"):
            one.fill(rows, field="ids", columns=["mask"], progress=False)
    assert not len(one.space)
    one.fill(MASKED[:1], field="ids", progress=False)
    one.fill(MASKED, field="ids", columns=["mask"], progress=False)  # what was there before keeps what it had
    entries = one.space.get([actcache.document_key(row["ids"]) for row in MASKED[:2]])
    assert [sorted(entry.columns) for entry in entries] == [[], ["mask"]]


def test_columns_of_documents_that_are_cut(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    options = {"too_long": actcache.windows(8, 2)}
    with actcache.Recycler(*loaded, layer=2, store=tmp_path / "store", **options) as one:
        rows = [{"text": "a b c d e f g h i j k l m n", "mask": [1] * 16}]
        with pytest.raises(UsageError, match="position 0 of the texts is cut into"):
            one.fill(rows, field="text", columns=["mask"], progress=False)
        assert not len(one.space)
