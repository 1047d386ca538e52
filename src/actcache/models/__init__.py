"""Recording and replaying transformers: everything of actcache that needs torch and transformers."""

from __future__ import annotations

from actcache.errors import MissingExtraError

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        f"recording and replaying models needs {error.name}: pip install 'actcache[models]'"
    ) from error

from actcache.models.consumers import load_consumer
from actcache.models.families import Family, base_model_of, family_of, register_family
from actcache.models.filling import FillReport
from actcache.models.loading import load_reduced
from actcache.models.lower_half import LowerHalf, plan_batches
from actcache.models.remote import Blueprint
from actcache.models.replay import reduce
from actcache.models.saving import merge
from actcache.models.tokenizing import DocumentEncoder, Encoded, tokenizer_digest
from actcache.models.training.adapters import add_adapters, copy_sharing_frozen, load_adapters, save_adapters
from actcache.models.training.regimes import Regime
from actcache.models.verification import Verification
from actcache.models.weights import lower_digest

__all__ = [
    "Blueprint",
    "DocumentEncoder",
    "Encoded",
    "Family",
    "FillReport",
    "LowerHalf",
    "Regime",
    "Verification",
    "add_adapters",
    "base_model_of",
    "copy_sharing_frozen",
    "family_of",
    "load_adapters",
    "load_consumer",
    "load_reduced",
    "lower_digest",
    "merge",
    "plan_batches",
    "reduce",
    "register_family",
    "save_adapters",
    "tokenizer_digest",
]
