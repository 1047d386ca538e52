"""The storage benchmark: shuffled reads of stored entries beside what the machine itself can do with the same rows.

``run`` makes stores of synthetic entries in a folder, reads them, and says how fast, as ratios to a limit that is
measured in the same rounds. docs/benchmarks.md says what the limits are and what is not measured.
"""

from actcache.admin.benchmark.corpus import SHAPES, Shape
from actcache.admin.benchmark.disk import Bench, run
from actcache.admin.benchmark.reading import Comparison, Contestant
from actcache.admin.benchmark.rounds import Spread

__all__ = ["SHAPES", "Bench", "Comparison", "Contestant", "Shape", "Spread", "run"]
