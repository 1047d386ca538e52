"""Interleaved rounds: ``actcache.benchmark.rounds``, by the name that the benchmarks here know."""

from actcache.benchmark.rounds import Spread, fastest, run

__all__ = ["Spread", "fastest", "run"]
