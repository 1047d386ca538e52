"""Vocabulary pruning: models without the embeddings of tokens that a corpus does not use.

Needs torch and transformers, as ``actcache.models`` does. ``docs/pruning.md`` says more.
"""

from __future__ import annotations

import actcache.models  # noqa: F401  says what to install where torch or transformers is missing
from actcache.models.vocabulary.checkpoint import load_pruned, save_full
from actcache.models.vocabulary.counts import Vocabulary, count_stored, count_vocabulary
from actcache.models.vocabulary.growth import Growth, grown_vocabulary
from actcache.models.vocabulary.pruned import Pruned, prune_vocabulary

__all__ = [
    "Growth",
    "Pruned",
    "Vocabulary",
    "count_stored",
    "count_vocabulary",
    "grown_vocabulary",
    "load_pruned",
    "prune_vocabulary",
    "save_full",
]
