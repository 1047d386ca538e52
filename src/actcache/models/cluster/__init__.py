"""Filling by the workers of a Ray cluster: each an actor with the lower half alone, which writes segments of its own.

The documents are read once, and partitioned by their keys. Why plain actors, and no
Ray Data: docs/decisions/0034-ray.md.
"""

from __future__ import annotations

from actcache.models.cluster.leader import fill
from actcache.models.cluster.recycling import fill_spaces

__all__ = ["fill", "fill_spaces"]
