"""Runs one target with atheris, guided by the coverage of the core and the backends.

    python -m tests.fuzz TARGET [--seconds 600] [--corpus FOLDER]

An input that is a finding is written to the working folder, and the exit status is not 0.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import tempfile
from pathlib import Path

import atheris

_BACKENDS = ("actcache_hdf5", "actcache_lmdb.datafile", "actcache_lmdb.record", "actcache_s3", "actcache_zarr")

with atheris.instrument_imports(include=["actcache", "actcache_hdf5", "actcache_zarr", "actcache_lmdb", "actcache_s3"]):
    for _name in _BACKENDS:  # instrumented is what is imported here first
        importlib.import_module(_name)
    from tests.fuzz.targets import TARGETS, WORDS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="kept from run to run")
    asked = parser.parse_args()
    logging.disable()
    target = TARGETS[asked.target]()
    corpus = asked.corpus or Path(tempfile.mkdtemp(prefix=f"corpus-{asked.target}-"))
    corpus.mkdir(exist_ok=True)
    seeds = list(target.seeds())
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
        target.parse(seed)  # each is good
    words = corpus.with_suffix(".dict")
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word[:60]) + '"\n' for word in WORDS))
    limit = max(map(len, seeds)) + 4096
    options = [f"-max_total_time={asked.seconds}", f"-max_len={limit}", f"-dict={words}", "-timeout=20"]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=2048", "-print_final_stats=1", str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
