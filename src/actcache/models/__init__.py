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

from actcache.models import families  # noqa: F401  (fills the table)
from actcache.models.family import Family, base_model_of, family_of, register_family
from actcache.models.record import LowerHalf, plan_batches
from actcache.models.replay import reduce
from actcache.models.tokenizing import DocumentEncoder, Encoded, tokenizer_digest
from actcache.models.weights import lower_digest

__all__ = [
    "DocumentEncoder",
    "Encoded",
    "Family",
    "LowerHalf",
    "base_model_of",
    "family_of",
    "lower_digest",
    "plan_batches",
    "reduce",
    "register_family",
    "tokenizer_digest",
]
