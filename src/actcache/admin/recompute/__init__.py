"""Entries computed again from what a store itself holds: to verify them, and to restore what was quarantined."""

from actcache.admin.recompute.models import RecordedModel, RecordedModels
from actcache.admin.recompute.restoring import Restoration, StoreRestoration, repair
from actcache.admin.recompute.verifying import StoreRecomputation, recompute

__all__ = [
    "RecordedModel",
    "RecordedModels",
    "Restoration",
    "StoreRecomputation",
    "StoreRestoration",
    "recompute",
    "repair",
]
