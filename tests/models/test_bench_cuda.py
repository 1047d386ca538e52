"""The one command for machines with a GPU, tried without one: on the processor, with tiny models, in this process."""

from __future__ import annotations

import gzip
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bus, checkout, cuda, upper_halves
from bench.tracing import copies_and_kernels
from tests.support import ROOT


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert cuda.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["bench.cuda: torch finds no GPU here, so there is nothing to measure"]


class InThisProcess:
    """Runs parts without processes of their own."""

    def __init__(self, device: torch.device, folder: Path, trace: Path, *, tiny: bool) -> None:
        self._device, self._folder, self._trace, self._tiny = device, folder, trace, tiny

    def __call__(self, part: cuda.Part, seconds: float) -> dict[str, Any]:
        if part.name == "tests":
            raise cuda.LeftOut("they are running")
        if part.name == "bus":
            return bus.measure(self._device, 0.0, (1 << 16,))
        kept: list[Any] = []
        found = upper_halves.measure(
            part.name, self._device, seconds, self._folder, kept.append, tiny=self._tiny, trace=self._trace
        )
        assert kept[-1] is found
        assert len(kept) == 5  # after each part
        return found


def test_tiny_models_on_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "Processes", InThisProcess)
    command = ["--device", "cpu", "--tiny", "--only", "tests,bus,deberta-v2-xl", "--results", str(tmp_path / "results")]
    assert cuda.main([*command, "--minutes", "60"]) == 0
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert written == {"cpu-tiny.json", "cpu-tiny.md", "cpu-tiny.trace.json.gz"}
    found = json.loads((tmp_path / "results/cpu-tiny.json").read_text())
    assert (found["device"], found["tiny"], found["failed"]) == ("cpu", True, [])
    assert found["left_out"] == ["tests: they are running"]
    assert found["parts"]["bus"]["gb_per_second"]["pageable"]["0 MiB"] > 0
    model = found["parts"]["deberta-v2-xl"]
    assert (model["cut"], model["batch"], model["tokens"]) == ("layers 3 to 4 of 4", 4, 16)
    for kind, contestants in (
        ("inference", {"full", "store", "memory"}),
        ("training", {"full", "frozen", "store", "memory"}),
    ):
        assert set(model[kind]["ms"]) == contestants
        assert all(spread["low"] > 0 for spread in model[kind]["ms"].values())
        assert set(model[kind]["times as fast"]) == contestants - {"full"}
        assert model[kind]["rounds"] == 2
    assert 0 <= model["inference"]["stall_fraction"] <= 1
    assert model["inference"]["gb_per_second_to_device"] is None  # there is no bus, and none is claimed
    assert model["recording"]["fill by forward"]["median"] > 0
    assert model["trace"]["share of copies beside kernels"] is None
    page = (tmp_path / "results/cpu-tiny.md").read_text()
    assert "| deberta-v2-xl, inference, 4 documents |" in page
    assert "- A trial with tiny models: these figures say nothing of any device." in page
    assert "- Left out: tests: they are running" in page
    assert "deberta-v2-xl, training, 4 documents" in capsys.readouterr().out


def test_a_batch_that_memory_does_not_do_for_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = upper_halves.UpperHalf("bert-base", torch.device("cpu"), tmp_path, tiny=True)
    tried = []

    def training(batch: int, until: float) -> dict[str, Any]:
        tried.append(batch)
        if batch > most:
            raise torch.OutOfMemoryError
        return {"ms": {}}

    monkeypatch.setattr(bench, "_training", training)
    most = 1
    assert bench.training(0.0) == {"batch": 1, "ms": {}}
    assert tried == [4, 2, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        bench.training(0.0)
    bench.close()


def test_time_is_dealt_out_and_what_was_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, given = [1000.0], {}
    monkeypatch.setattr(cuda.time, "monotonic", lambda: clock[0])
    needs = {"quick": 5.0, "fails": 20.0, "greedy": 100.0, "late": 1.0}

    def runner(part: cuda.Part, seconds: float) -> dict[str, Any]:
        given[part.name] = seconds
        clock[0] += needs[part.name]
        if part.name == "fails":
            raise cuda.Failed("it exited 1: a reason", {"inference": 1, "left_out": ["training: no time"]})
        return {"figure": part.name}

    parts = [cuda.Part(name, weight) for name, weight in (("quick", 1), ("fails", 1), ("greedy", 2), ("late", 1))]
    found = cuda.run(parts, 125.0, runner, lambda part: None)
    assert given == {"quick": 25.0, "fails": 30.0, "greedy": pytest.approx(100 * 2 / 3)}
    assert found["failed"] == ["fails: it exited 1: a reason"]
    assert found["left_out"] == ["fails, training: no time", "late: 0 s were left for it"]
    assert set(found["parts"]) == {"quick", "fails", "greedy"}  # what it had is kept
    assert found["parts"]["quick"] == {"figure": "quick", "given_seconds": 25.0, "wall_seconds": 5.0}


@pytest.mark.parametrize(
    ("script", "why"),
    [("echo first; echo 'no memory' >&2; exit 3", "it exited 3: no memory"), ("sleep 100", "it was ended after 0 s")],
)
def test_a_part_that_fails_or_hangs(script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    runner = cuda.Processes(torch.device("cpu"), tmp_path, tmp_path / "trace.json", tiny=True)
    monkeypatch.setattr(cuda.sys, "executable", str(program))
    monkeypatch.setattr(cuda, "GRACE", 0.3 if "sleep" in script else 30.0)
    with pytest.raises(cuda.Failed, match=why) as caught:
        runner(cuda.Part("bus", 1.0), 0.0)
    assert caught.value.found == {}


def test_what_a_trace_says_of_copies(tmp_path: Path) -> None:
    def event(kind: str, name: str, begin: float, duration: float) -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": duration}

    events = [
        event("kernel", "gemm", 0, 10),
        event("kernel", "Memcpy is but a name", 20, 10),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 5, 10),  # half of it beside a kernel
        event("gpu_memcpy", "CopyHostToDevice", 20, 10),  # all of it
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 40, 10),
        event("cpu_op", "aten::copy_", 0, 50),
        {"ph": "i", "cat": "kernel", "name": "a mark", "ts": 45},
    ]
    for name, opened in (("trace.json", open), ("trace.json.gz", gzip.open)):
        path = tmp_path / name
        with opened(path, "wt") as file:
            json.dump({"traceEvents": events}, file)
        found = copies_and_kernels(path)
        assert (found.copies, found.kernels, found.share) == (2, 2, 0.75)


def test_a_bare_checkout_has_the_entry_points_of_an_installation(tmp_path: Path) -> None:
    checkout.write_metadata(tmp_path)
    [bare] = metadata.distributions(path=[str(tmp_path)])
    installed = metadata.distribution("actcache")

    def points(distribution: metadata.Distribution) -> set[tuple[str, str, str]]:
        return {(p.group, p.name, p.value) for p in distribution.entry_points if p.group == "actcache.backends"}

    assert points(bare) == points(installed)
    assert bare.version == installed.version


def test_names_of_files_are_those_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "model_of", lambda device: "Vendor (R) X-100 80GB/PCIe")
    assert cuda.name_of(torch.device("cuda"), tiny=False) == "vendor-r-x-100-80gb-pcie"
    assert cuda.name_of(torch.device("cuda"), tiny=True) == "vendor-r-x-100-80gb-pcie-tiny"
    assert not list((ROOT / "bench/results").glob("*-tiny.json"))  # trials are not kept
