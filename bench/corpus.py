"""The documents of a benchmark: ``actcache.benchmark.corpus``, by the name that the benchmarks here know."""

from actcache.benchmark.corpus import Corpus, Documents

__all__ = ["Corpus", "Documents"]
