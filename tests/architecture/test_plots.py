"""The docs' pictures are those that commands make; the plots of docs/benchmarks.md say what its tables say."""

from __future__ import annotations

import re

import pytest

from bench import concepts, picture
from bench.plots import DOCS, PAGE, pictures, row_of, speedups

TEXT = PAGE.read_text(encoding="utf-8")


def test_they_are_of_the_figures_on_the_page():
    drawn = pictures(TEXT)
    for name, one in drawn.items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == one, "python -m bench.plots"
        assert f"](images/{name})" in TEXT
        assert "prefers-color-scheme: dark" in one
    said = [float(one) for one in re.findall(r">(\d\.\d\d)<", drawn["backends.svg"])]
    assert len(said) == 12
    for backend, four in zip(("hdf5", "zarr", "lmdb"), (said[:4], said[4:8], said[8:]), strict=True):
        cells = row_of(TEXT.partition("The four backends")[2].partition("\n(")[0], f"{backend} |")
        assert [f"{one:.2f}" for one in four] == [*cells[1].split(" / "), *cells[2].split(" / ")]
    widths = [float(one) for one in re.findall(r'width="([\d.]+)" height="16" rx="3"/><text', drawn["speedups.svg"])]
    assert [round(width / 130, 2) for width in widths] == list(map(float, speedups(TEXT).values()))


def test_the_other_pictures_are_those_that_commands_make():
    made = {**concepts.pictures(), "how.svg": picture.picture()}
    for name, drawn in made.items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == drawn, "python -m bench.concepts, bench.picture"
        assert "prefers-color-scheme: dark" in drawn
    page = (DOCS / "concepts.md").read_text(encoding="utf-8")
    assert all(f"](images/{name})" in page for name in concepts.pictures())


def test_a_figure_that_is_gone_is_missed():
    with pytest.raises(ValueError, match="0 rows"):
        speedups(TEXT.replace("int8 upper half", "int8"))
