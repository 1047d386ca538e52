"""Everything that only a machine with a GPU can tell, in one command and a given time.

    python -m bench.cuda --minutes 8

It needs no installation: a checkout, torch, transformers, h5py, xxhash, typer, rich and a C compiler are enough, and
nothing is downloaded. Its parts: the tests of the way to the device (where pytest is installed); GB/s from the host to
the device; then for BERT-base, BERT-large, RoBERTa-large and DeBERTa-v2-XL (random weights, batches of 128 documents
of 512 tokens, half precision) what ``bench.upper_halves`` says. Each part is a process of its own, gets its share of
the time that is left, and is ended when that is over. What was left out, failed or was ended is named.

It writes ``bench/results/NAME.json``, the same as a table in ``NAME.md``, and a trace of the first model's inference
for https://ui.perfetto.dev, ``NAME.trace.json.gz``, where NAME is the device's. Without a GPU it says so and exits 2;
with 1, where a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.checkout import ROOT, environment

MODELS = ("bert-base", "bert-large", "roberta-large", "deberta-v2-xl")
GRACE = 20.0  # seconds that a part may take longer than it was given, before it is ended
LEAST = 10.0  # seconds; a part that would get less is left out


@dataclass(frozen=True)
class Part:
    """A piece of the work, and how much time it gets beside the others."""

    name: str
    weight: float


PARTS = (
    Part("tests", 1.0),
    Part("bus", 0.3),
    Part("bert-base", 1.2),
    Part("bert-large", 1.6),
    Part("roberta-large", 1.6),
    Part("deberta-v2-xl", 2.3),
)

#: Runs a part in so many seconds and returns what it found; raises ``Failed``.
Runner = Callable[[Part, float], dict[str, Any]]


class Failed(Exception):
    """A part failed, or was ended; what it had found until then, if anything."""

    def __init__(self, why: str, found: dict[str, Any] | None = None) -> None:
        super().__init__(why)
        self.found = found


class LeftOut(Exception):
    """A part cannot be run here, and why."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", help=f"parts, with commas, of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--device", help=argparse.SUPPRESS)  # cpu: to try the program out
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help="where to make the stores (removed afterwards)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", help="where to write what was found")
    options = parser.parse_args(arguments)
    device = device_of(options.device)
    if device is None:
        print("bench.cuda: torch finds no GPU here, so there is nothing to measure", file=sys.stderr)
        return 2
    chosen = [part for part in PARTS if options.only is None or part.name in options.only.split(",")]
    if not chosen:
        parser.error(f"--only {options.only} names no part")
    name = name_of(device, tiny=options.tiny)
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="actcache-cuda-", dir=options.dir) as folder:
        runner = Processes(device, Path(folder), options.results / f"{name}.trace.json.gz", tiny=options.tiny)
        found = run(chosen, options.minutes * 60, runner, lambda part: print(f"{part.name} ...", flush=True))
    found = {**where(device, tiny=options.tiny), "minutes": options.minutes, **found}
    (options.results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = rows(found)
    (options.results / f"{name}.md").write_text(markdown(found, lines))
    show(found, lines)
    return 1 if found["failed"] else 0


def device_of(asked: str | None) -> torch.device | None:
    """Return the device to measure: what was asked for, else the accelerator; None where there is none."""
    if asked is not None:
        return torch.device(asked)
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None or accelerator.type == "mps" else accelerator


def model_of(device: torch.device) -> str:
    """Return what a device is called."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device.type).get_device_name(device))


def name_of(device: torch.device, *, tiny: bool) -> str:
    """Return a name for files: of the device, and whether its figures are but of a trial."""
    name = re.sub(r"[^a-z0-9]+", "-", model_of(device).lower()).strip("-")
    return f"{name}-tiny" if tiny else name


def where(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Return what was measured, and with which versions."""
    return {
        "device": model_of(device),
        "tiny": tiny,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def run(parts: Sequence[Part], seconds: float, runner: Runner, tell: Callable[[Part], object]) -> dict[str, Any]:
    """Run parts one after another, each in its share of the time that is left then; return all that was found.

    A part that needs less than its share leaves the rest to those after it.
    """
    until = time.monotonic() + seconds
    found: dict[str, Any] = {"parts": {}, "left_out": [], "failed": []}
    for number, part in enumerate(parts):
        share = part.weight / sum(other.weight for other in parts[number:])
        given = (until - time.monotonic()) * share
        if given < LEAST:
            found["left_out"].append(f"{part.name}: {max(0.0, given):.0f} s were left for it")
            continue
        tell(part)
        begin = time.monotonic()
        try:
            result = runner(part, given)
        except LeftOut as error:
            found["left_out"].append(f"{part.name}: {error}")
            continue
        except Failed as error:
            found["failed"].append(f"{part.name}: {error}")
            result = error.found or {}
        left_out = result.pop("left_out", [])
        found["left_out"] += [f"{part.name}, {what}" for what in left_out]
        if result:
            found["parts"][part.name] = {**result, "given_seconds": given, "wall_seconds": time.monotonic() - begin}
    return found


class Processes:
    """Runs parts in processes of their own."""

    def __init__(self, device: torch.device, folder: Path, trace: Path, *, tiny: bool) -> None:
        self._device, self._folder, self._trace, self._tiny = device, folder, trace, tiny
        self._traced = False
        self._environment = environment(folder / "installed")

    def __call__(self, part: Part, seconds: float) -> dict[str, Any]:
        return self._tests(seconds) if part.name == "tests" else self._measured(part, seconds)

    def _measured(self, part: Part, seconds: float) -> dict[str, Any]:
        written = self._folder / f"{part.name}.json"
        begin = ["bench.bus"] if part.name == "bus" else ["bench.upper_halves", part.name]
        command = [sys.executable, "-m", *begin, "--device", str(self._device), "--json", str(written)]
        if part.name != "bus":
            command += ["--dir", str(self._folder)]
            if not self._traced:
                command += ["--trace", str(self._trace)]
                self._traced = True
        # A process takes a while to begin, which is part of its time.
        command += ["--seconds", f"{max(LEAST / 2, seconds - LEAST / 2):.0f}", *(["--tiny"] if self._tiny else [])]
        try:
            status, output = self._process(command, seconds)
            why = "" if status == 0 else f"it exited {status}: {last_line(output)}"
        except subprocess.TimeoutExpired:
            why = f"it was ended after {seconds + GRACE:.0f} s"
        found = json.loads(written.read_text()) if written.exists() else {}
        if why:
            raise Failed(why, found)
        return dict(found)

    def _tests(self, seconds: float) -> dict[str, Any]:
        if importlib.util.find_spec("pytest") is None:
            raise LeftOut("pytest is not installed")
        # Only what such a machine has: the project's own settings ask for plug-ins, and its conftest for hypothesis.
        bare = importlib.util.find_spec("hypothesis") is None or importlib.util.find_spec("pytest_timeout") is None
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        if bare:
            settings = self._folder / "pytest.ini"
            settings.write_text("[pytest]\nmarkers =\n    long\n    processes\n")
            command += ["-c", str(settings), "--noconftest"]
        # What this one measures is measured by the other parts.
        command += ["--deselect", "tests/reader/test_cuda.py::test_copies_run_beside_kernels"]
        files = ["tests/reader/test_cuda.py", *([] if bare else ["tests/reader/test_streams.py"])]
        try:
            status, output = self._process([*command, *(str(ROOT / file) for file in files)], seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"they were ended after {seconds + GRACE:.0f} s") from None
        found = {"files": files, "summary": last_line(output)}
        if status:
            raise Failed(f"pytest exited {status}: {last_line(output)}", {**found, "output": output[-4000:]})
        return found

    def _process(self, command: list[str], seconds: float) -> tuple[int, str]:
        """Run a command; return its exit status and what it wrote. Ended, with all it started, after its time."""
        log = self._folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(seconds + GRACE)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        return status, log.read_text(errors="replace")


def last_line(output: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


# --- what is shown ---------------------------------------------------------------------------------------------------

COLUMNS = ("", "full, ms", "frozen, ms", "store, ms", "memory, ms", "store: times as fast", "of the ideal", "rounds")


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Return a line for each model's inference and training."""
    lines = []
    for name in MODELS:
        for kind in ("inference", "training"):
            figures = found["parts"].get(name, {}).get(kind)
            if figures is None:
                continue
            ms = [_spread(figures["ms"].get(contestant), 1) for contestant in ("full", "frozen", "store", "memory")]
            fast, ideal = figures["times as fast"]["store"], figures["share of the ideal"]
            title = f"{name}, {kind}, {figures['batch']} documents"
            lines.append([title, *ms, _spread(fast, 2), _spread(ideal, 3), str(figures["rounds"])])
    return lines


def notes(found: dict[str, Any]) -> list[str]:
    """Return what else was found, a sentence each."""
    parts, said = found["parts"], []
    if found["tiny"]:
        said.append("A trial with tiny models: these figures say nothing of any device.")
    if "tests" in parts:
        said.append(f"Tests: {parts['tests']['summary']}")
    for kind, sizes in parts.get("bus", {}).get("gb_per_second", {}).items():
        said.append(f"To the device, {kind}: " + ", ".join(f"{size} {rate:.1f} GB/s" for size, rate in sizes.items()))
    for name in MODELS:
        part = parts.get(name, {})
        if (inference := part.get("inference")) is not None:
            bus = inference["gb_per_second_to_device"]
            told = "" if bus is None else f", its copies went at {bus:.1f} GB/s"
            said.append(f"{name}: the consumer waited {inference['stall_fraction']:.1%} of its time{told}")
        if (recording := part.get("recording")) is not None:
            ratio = _spread(recording["fill by forward"], 3)
            said.append(f"{name}: recording took {ratio} of the lower half's own forward")
        if (trace := part.get("trace")) is not None:
            share = trace["share of copies beside kernels"]
            seen = "no copies to a device in the trace" if share is None else f"{share:.1%} of copy time beside kernels"
            said.append(f"{name}: {seen}")
    said += [f"Left out: {what}" for what in found["left_out"]]
    said += [f"Failed: {what}" for what in found["failed"]]
    return said


def _spread(spread: dict[str, float] | None, decimals: int) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.{decimals}f} [{spread['low']:.{decimals}f}, {spread['high']:.{decimals}f}]"


def title_of(found: dict[str, Any]) -> str:
    return f"{found['device']}, torch {found['torch']}, {found['when'][:10]}, {found['minutes']:g} minutes"


def markdown(found: dict[str, Any], lines: list[list[str]]) -> str:
    """Return everything as a page."""
    page = [f"# {title_of(found)}", ""]
    if lines:
        page += [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *lines)] + [""]
    return "\n".join([*page, *(f"- {note}" for note in notes(found))]) + "\n"


def show(found: dict[str, Any], lines: list[list[str]]) -> None:
    console = Console(width=200)
    if lines:
        table = Table(title=title_of(found))
        for number, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if number else "left")
        for cells in lines:
            table.add_row(*cells)
        console.print(table)
    for note in notes(found):
        console.print(note, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
