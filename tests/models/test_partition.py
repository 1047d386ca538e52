"""Shares of a corpus: together they store what one fill stores, and no document is computed twice."""

from __future__ import annotations

from functools import reduce
from operator import add

import pytest

import actcache
from actcache import Recycler, Recyclers
from actcache.errors import DocumentTooLongError, UsageError
from actcache.models.filling import FillReport
from actcache.models.partition import Partition, share_of
from tests.cli.running import cachectl
from tests.cli.test_fill import TEXTS, _own_cache, loaded, same, tiny  # noqa: F401

GIVEN = [*TEXTS, *TEXTS[:5]]  # some stand twice


def test_shares_together_are_the_whole(loaded, tmp_path):  # noqa: F811
    reports = []
    for share in ("0/3", (1, 3), Partition(2, 3)):
        with Recyclers(*loaded, layers=[1, 3], store=tmp_path / "s", dtype="float32") as recyclers:
            reports.append(recyclers.fill(GIVEN, progress=False, partition=share))
    with (
        Recyclers(*loaded, layers=[1, 3], store=tmp_path / "s", dtype="float32") as together,
        Recyclers(*loaded, layers=[1, 3], store=tmp_path / "alone", dtype="float32") as alone,
    ):
        whole = alone.fill(GIVEN, progress=False)
        said = reduce(add, reports)
        for name in ("documents", "present", "computed", "tokens", "left_out", "spaces"):
            assert getattr(said, name) == getattr(whole, name)
        assert said.seconds == max(report.seconds for report in reports)
        assert all(report.computed > len(TEXTS) // 6 for report in reports)
        for layer in (1, 3):
            same(together[layer], alone[layer])
        assert together.missing(GIVEN) == []


def test_what_is_missing_is_what_a_fill_computes(loaded, tmp_path):  # noqa: F811
    """Also of windows, and of a document that lacks one of two sites; the oracle is the key's own share."""
    expected = [i for i, text in enumerate(TEXTS) if share_of(actcache.document_key(text), 2)]
    windows = actcache.windows(8, 2)
    for too_long in ("refuse", windows):
        with Recycler(*loaded, layer=3, store=tmp_path / "s", too_long=too_long) as recycler:
            assert recycler.missing(GIVEN) == list(range(len(TEXTS)))
            assert recycler.fill(GIVEN, progress=False, partition="0/2").computed == len(TEXTS) - len(expected)
            assert recycler.missing(iter(GIVEN)) == expected
            assert recycler.missing([{"body": text} for text in TEXTS], field="body") == expected
    with Recyclers(*loaded, layers=[1, 3], store=tmp_path / "s") as recyclers:
        assert recyclers.missing(TEXTS) == list(range(len(TEXTS)))
        recyclers[1].fill(TEXTS, progress=False)
        assert recyclers.missing(TEXTS) == expected


def test_errors_name_the_place_in_the_whole_corpus(loaded, tmp_path):  # noqa: F811
    texts = [*TEXTS[:50], "la " * 3000, *TEXTS[50:]]
    mine = share_of(actcache.document_key(texts[50]), 4)
    with Recycler(*loaded, layer=1, store=tmp_path / "s") as recycler:
        with pytest.raises(DocumentTooLongError, match="50 "):
            recycler.fill(texts, progress=False, partition=(mine, 4))
        assert recycler.fill(texts, progress=False, partition=((mine + 1) % 4, 4)).computed > 0


@pytest.mark.parametrize("given", ["4/4", "-1/4", "1", "a/b", "1/2/3", (0, 0), 3, (1, 2, 3), "0/0"])
def test_what_is_no_share(given, loaded, tmp_path):  # noqa: F811
    with Recycler(*loaded, layer=1, store=tmp_path / "s") as recycler, pytest.raises(UsageError, match="partition"):
        recycler.fill(TEXTS, partition=given)


def test_reports_of_other_spaces_do_not_add_up():
    one, other = (FillReport(1, 0, 1, 5, 0.5, 0, {1: name}) for name in ("a", "b"))
    with pytest.raises(UsageError, match="other spaces"):
        _ = one + other


def test_by_the_command(tiny, tmp_path):  # noqa: F811
    (tmp_path / "corpus.txt").write_text("\n".join(GIVEN))
    fill = ["fill", tmp_path / "s", tmp_path / "corpus.txt", "--model", tiny, "--layer", 1, "--json", "--quiet"]
    shares = [cachectl(*fill, "--partition", f"{number}/2").json() for number in (0, 1)]
    assert sum(share["computed"] for share in shares) == len(TEXTS)
    assert sum(share["documents"] for share in shares) == len(GIVEN)
    whole = cachectl(*fill, "--collection", "all").json()
    assert (whole["computed"], whole["present"], whole["collection"]) == (0, len(GIVEN), "all")
    for wrong in (["--collection", "c"], ["--devices", "cpu,cpu"], ["--dry-run"]):
        assert "--partition" in cachectl(*fill, "--partition", "0/2", *wrong).refused(2)
    assert "0 to 1" in cachectl(*fill, "--partition", "2/2").refused(2)
