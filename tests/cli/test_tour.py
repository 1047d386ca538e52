"""docs/tour.md is a session that runs, and the digests at its end are those at its start."""

from __future__ import annotations

import re

import pytest

from tests.cli.tour import STEPS, run
from tests.support import ROOT


def shape(output: str) -> list[str]:
    """Return what does not depend on the machine: no numbers, digests, units, widths."""
    text = re.sub(r"\b[0-9a-f]{8,32}\b", "HEX", output)
    text = re.sub(r"\d[\d,.]*", "N", text)
    text = re.sub(r"\b([KMG]i)?B\b|\b(us|s|min)\b", "UNIT", text)
    return [re.sub(r"[\s─-╿]+", " ", line).strip() for line in text.splitlines()]


def test_the_tour(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    steps = run()
    ran = {one.command.split(" --")[0]: one for step in steps for one in step}
    digests = [
        re.findall(r"(?:should|does) hold +([0-9a-f]{32})", one.out) for name, one in ran.items() if " migrate " in name
    ]
    assert len(digests) == 4
    assert len({digest for pair in digests for digest in pair}) == 1
    assert all(len(pair) == 2 for pair in digests)
    text = (ROOT / "docs" / "tour.md").read_text()
    for step, (prose, _) in zip(steps, STEPS, strict=True):
        assert prose in text, "python -m tests.cli.tour docs/tour.md"
        recorded = text[text.index(prose) :].split("```")[1]
        for one in step:
            command = shape(one.command)[0]
            lines = shape(recorded)
            assert f"$ {command}" in lines
            if " inspect " in one.command:  # versions, paths
                continue
            begin = lines.index(f"$ {command}") + 1
            said = [line for line in shape(one.out) if line]
            assert [line for line in lines[begin:] if line][: len(said)] == said, one.command


def test_shapes_differ():
    assert shape("3 entries") != shape("3 segments")
    assert shape("12.3 KiB, 0123456789ab") == shape("1.3 MiB, ffffffffffff")
    with pytest.raises(AssertionError):
        assert shape("intact") == shape("1 corrupt entry")
