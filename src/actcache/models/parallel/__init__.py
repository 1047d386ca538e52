"""Filling by several processes of one machine, each with its own copy of the model: a GPU each, or a share of the CPU.

The corpus is read once, and partitioned by the documents' keys; each process writes segments of its own into the store.
"""

from __future__ import annotations

from actcache.models.parallel.leader import check_devices, fill

__all__ = ["check_devices", "fill"]
