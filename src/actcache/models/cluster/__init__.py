"""Filling by the workers of a Ray cluster: each an actor with the lower half alone, which writes segments of its own.

The documents are read once, and partitioned by their keys. Why plain actors, and no
Ray Data: docs/decisions/0034-ray.md.
"""

from __future__ import annotations

from actcache.models.cluster.documents import documents_of
from actcache.models.cluster.leader import fill

__all__ = ["documents_of", "fill"]
