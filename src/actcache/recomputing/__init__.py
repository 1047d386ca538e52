"""Entries computed again from what a store itself holds: to verify them, and to restore what was quarantined."""

from actcache.recomputing.models import RecordedModel, RecordedModels
from actcache.recomputing.restoring import Restoration, StoreRestoration, repair
from actcache.recomputing.verifying import StoreRecomputation, recompute

__all__ = [
    "RecordedModel",
    "RecordedModels",
    "Restoration",
    "StoreRecomputation",
    "StoreRestoration",
    "recompute",
    "repair",
]
