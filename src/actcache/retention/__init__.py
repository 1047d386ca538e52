"""What a store keeps: which spaces and entries go, by a plan that is shown first, and what is protected.

A plan never holds a pinned space, nor one where somebody may be at work. What it says is looked at again right before
each deletion.
"""

from actcache.retention.plan import Plan, Removal, plan
from actcache.retention.prune import Pruning, prune
from actcache.retention.state import IDLE_SECONDS, PINNED, SpaceState, pin, states, unpin

__all__ = [
    "IDLE_SECONDS",
    "PINNED",
    "Plan",
    "Pruning",
    "Removal",
    "SpaceState",
    "pin",
    "plan",
    "prune",
    "states",
    "unpin",
]
