"""What the machine itself can do: ``actcache.benchmark.limits``, by the name that the benchmarks here know."""

from actcache.benchmark.limits import FlatFile

__all__ = ["FlatFile"]
