"""The document shapes: ``actcache.benchmark.shapes``, by the name that the benchmarks here know."""

from actcache.benchmark.shapes import SHAPES, Shape

__all__ = ["SHAPES", "Shape"]
