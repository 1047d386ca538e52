"""The page cache: ``actcache.benchmark.caches``, by the name that the benchmarks here know."""

from actcache.benchmark.caches import drop_caches, refuse_mappings

__all__ = ["drop_caches", "refuse_mappings"]
