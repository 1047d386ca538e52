"""A store moves to an object store and back."""

from __future__ import annotations

from tests.cli.test_migrate import contents, make_source, run


def test_there_and_back(bucket, tmp_path):
    make_source(tmp_path / "source")
    held = contents(tmp_path / "source")
    there = run(tmp_path / "source", bucket.url, target_options=bucket.options)
    assert there.equal
    assert contents(bucket.url, **bucket.options) == held
    again = run(tmp_path / "source", bucket.url, target_options=bucket.options)
    assert [space.copied for space in again.spaces] == [0, 0]
    back = run(bucket.url, f"lmdb:{tmp_path}/back", source_options=bucket.options)
    assert back.equal
    assert [space.digest for space in back.spaces] == [space.target_digest for space in there.spaces]
    assert contents(tmp_path / "back") == held
