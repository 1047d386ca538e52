"""bench.scale: its simulation against sums by hand and the arithmetic of plan; on a server it is a bench of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.scale import Costs, Machine, paper, simulate, waiting_too
from tests.support import ROOT


@pytest.mark.parametrize(
    ("costs", "machine", "processes", "batch", "expected"),
    [
        (Costs(0, 0, 0.1), Machine(2, 100), 3, 4, 120),  # nothing but waiting
        (Costs(0.01, 0, 0), Machine(2, 100), 4, 1, 200),  # two processors
        (Costs(0.01, 0, 0), Machine(2, 100), 1, 1, 100),  # of which one process uses one
        (Costs(0, 0.02, 0), Machine(8, 1), 5, 2, 50),  # a server that does one thing at a time
        (Costs(0.01, 0.03, 0), Machine(2, 8), 8, 4, 50),  # on the same processors
        (Costs(0.01, 0.03, 0), Machine(2, 8, shared=False), 8, 4, 200),  # on its own
    ],
)
def test_sums_by_hand(costs, machine, processes, batch, expected):
    assert simulate(costs, machine, processes, batch, 15) == pytest.approx(expected, rel=0.05)


def test_waiting_is_found_again():
    costs, machine = Costs(0.01, 0.2, 0.5), Machine(2, 2)
    rate = simulate(costs, machine, 6, 1, 60)
    taken_for_work = Costs(0.01, 0.7, 0)
    found = waiting_too(taken_for_work, machine, 6, rate)
    assert found.latency == pytest.approx(0.5, abs=0.08)
    assert found.server + found.latency == pytest.approx(0.7)


def test_the_arithmetic_of_plan_is_simulated():
    for _, arithmetic, simulated in paper(1.63):
        assert simulated == pytest.approx(arithmetic, rel=0.15)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_bench_runs():
    command = [
        sys.executable,
        "-m",
        "bench.scale",
        "--seconds",
        "2",
        "--processes",
        "1,2",
        "--batches",
        "1",
        "--within",
        "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "the worst prediction is off by" in done.stdout
