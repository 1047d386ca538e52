"""Corpora that lie in an object store are read as those that lie here."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import uuid

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actcache.cli import corpus
from actcache.errors import DocumentError, MissingExtraError, StoreError, UsageError
from actcache.segments.places.objects.buckets import Bucket as Reading
from actcache.segments.places.objects.options import target
from tests.cli.running import cachectl

TEXTS = [f"text {number} żółć\r\n" + "x" * number for number in range(60)]


def lines(texts):
    return "".join(json.dumps({"n": number, "body": text}) + "\n" for number, text in enumerate(texts)).encode()


def read(source, field="body"):
    corpus.check(source, field)
    return [one.text for one in corpus.read(source, field)]


@pytest.fixture(params=["s3", "memory"])
def place(request, bucket, monkeypatch):
    """A function that writes an object, and the URL of where it lies."""
    if request.param == "memory":
        name = f"corpora-{uuid.uuid4().hex[:8]}"
        fs = fsspec.filesystem("memory")
        yield (lambda key, data: fs.pipe_file(f"/{name}/{key}", data)), f"memory://{name}"
        fs.rm(f"/{name}", recursive=True)
        return
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.server.keys["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.server.keys["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    put = lambda key, data: bucket.s3.put_object(Bucket=bucket.name, Key=key, Body=data)  # noqa: E731
    yield put, f"s3://{bucket.name}"


def test_files_folders_and_patterns(place):
    put, url = place
    for number, name in enumerate(("c/0.jsonl", "c/1.jsonl.gz", "c/sub/2.jsonl.gz")):
        data = lines(TEXTS[number * 20 : number * 20 + 20])
        put(name, gzip.compress(data) if name.endswith("gz") else data)
    for name in ("c/README.md", "c/_SUCCESS", "c/.hidden.jsonl", "cc/9.jsonl", "other.csv"):
        put(name, b"x,y\n1,2\n")
    assert read(f"{url}/c/0.jsonl") == TEXTS[:20]
    for source in (f"{url}/c", f"{url}/c/", f"{url}/c/**/[0-9].jsonl*", f"{url}/c/**/*.jsonl*"):
        assert read(source) == TEXTS
    assert read(f"{url}/c/*.jsonl*") == TEXTS[:40]
    assert read(f"{url}/c/*.jsonl.gz") == TEXTS[20:40]
    assert read(f"{url}/c/*/[12].jsonl.gz") == TEXTS[40:]
    assert corpus.count(f"{url}/c", "body") is None
    assert not corpus.is_stream(f"{url}/c")
    for source, said in (
        (f"{url}/none.jsonl", "cannot read .*none.jsonl: there is no such object"),
        (f"{url}/none/*.jsonl", "no file matches .*none/"),
        (url, "several kinds"),
        (f"{url}/other.csv", "other.csv: there is no column 'body'; there are 'x', 'y'"),
    ):
        with pytest.raises(DocumentError, match=said):
            corpus.check(source, "body")
    with pytest.raises(DocumentError, match=r"sub/2.jsonl.gz: line 1: name the field .* there are 'n', 'body'"):
        list(corpus.read(f"{url}/c/sub/2.jsonl.gz"))


def test_columns_and_saved_datasets(place, tmp_path):
    put, url = place
    out = io.BytesIO()
    pq.write_table(pa.table({"body": TEXTS, "n": list(range(60))}), out, row_group_size=7)
    put("p/a.parquet", out.getvalue())
    assert [(one.id, one.text) for one in corpus.read(f"{url}/p", "body", "n")] == [
        (str(number), text) for number, text in enumerate(TEXTS)
    ]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=3)
    for path in (tmp_path / "saved").iterdir():
        put(f"saved/{path.name}", path.read_bytes())
    assert read(f"{url}/saved") == TEXTS


def test_a_shard_that_disappears_or_changes(place):
    put, url = place
    draw = random.Random(3)
    long = [draw.randbytes(30_000).hex() for _ in range(60)]  # more than is fetched at once
    put("c/0.jsonl", lines(long))
    put("c/1.jsonl", lines(TEXTS))
    assert read(f"{url}/c") == [*long, *TEXTS]
    documents = corpus.read(f"{url}/c", "body")
    next(documents)
    put("c/0.jsonl", lines(long[:50]))
    with pytest.raises(StoreError, match=r"0\.jsonl was replaced while it was read"):
        list(documents)


def test_any_part_of_an_object(place):
    """Read and sought in any order, it is the same bytes."""
    put, url = place
    draw = random.Random(5)
    data = draw.randbytes(5 << 20)
    put("object", data)
    bucket = Reading(target(f"{url}/object", {}))
    try:
        with bucket.open("object") as file, io.BytesIO(data) as same:
            for _ in range(60):
                if draw.random() < 0.6:
                    at = draw.randrange(len(data) + 10)
                    assert file.seek(at) == same.seek(at)
                size = draw.choice([1, 100, 70_000, 1 << 20, 3 << 20])
                assert file.read(size) == same.read(size)
            assert file.seek(-5, io.SEEK_END) == len(data) - 5
            assert file.read() == data[-5:]
    finally:
        bucket.close()


def test_options_stand_in_the_url(bucket, monkeypatch):
    """As of a store: no secrets, and a question mark begins them."""
    bucket.s3.put_object(Bucket=bucket.name, Key="c/0.jsonl", Body=lines(TEXTS))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.server.keys["secret"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.server.keys["key"])
    query = f"?endpoint_url={bucket.server.endpoint}&region=us-east-1"
    for name in ("c", "c/*.jsonl", "c/0.jsonl"):
        assert read(f"s3://{bucket.name}/{name}{query}") == TEXTS
    with pytest.raises(UsageError, match="does not belong in a URL"):
        corpus.check(f"s3://{bucket.name}/c?secret=x", "body")
    with pytest.raises(UsageError, match="is no bucket"):
        corpus.check("s3://*/c", "body")
    with pytest.raises(StoreError, match="no bucket"):
        corpus.check(f"s3://{bucket.name}-none/c{query}", "body")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "actcache.segments.places.objects.buckets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'actcache\[s3\]'"):
        corpus.check("s3://bucket/c.txt")


def test_pruning_by_a_corpus_elsewhere(place, tmp_path):
    put, url = place
    put("c/0.jsonl.gz", gzip.compress(lines(TEXTS)))
    line = cachectl("prune", tmp_path / "store", "--keep-only", f"{url}/c/*.jsonl.gz").refused(2)
    assert "there are 'n', 'body'" in line
    assert len(corpus.keys(f"{url}/c/*.jsonl.gz", "body")) == len(TEXTS)
