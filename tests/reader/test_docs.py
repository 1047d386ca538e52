"""docs/reader.md: its examples run, and its table of measurements is complete."""

from __future__ import annotations

import re

import pytest

from actcache.reader.stats import ReaderStats
from tests.support import ROOT

TEXT = (ROOT / "docs/reader.md").read_text()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore::UserWarning")  # Lightning's own
def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(<!-- not run -->\n)?```python\n(.*?)```", TEXT, re.DOTALL)
    assert len([code for skipped, code in blocks if not skipped]) >= 7
    names: dict[str, object] = {}
    for skipped, code in blocks:
        compiled = compile(code, "docs/reader.md", "exec")
        if not skipped:
            exec(compiled, names)
    names["store"].close()
    assert (tmp_path / "actcache.prom").read_text().count("\n") == 3 * len(ReaderStats().metrics())
    assert list((tmp_path / "local").glob("spaces/*/segments/*"))


def test_every_measurement_is_listed():
    for metric in ReaderStats().metrics():
        assert f"| `{metric.name}` | `{metric.prometheus_name}` | {metric.unit} |" in TEXT
