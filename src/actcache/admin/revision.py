"""What a revision of a corpus costs: the library side of ``cachectl diff``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from actcache.admin.planning import row_bytes
from actcache.errors import MissingEntryError, SpaceNotFoundError, StoreNotFoundError
from actcache.format.keys import Document, Windows
from actcache.models.families import base_model_of, family_of
from actcache.models.lower_half import LowerHalf
from actcache.models.passages import Revision, compare, outline_of
from actcache.models.pretrained import load_pretrained
from actcache.models.recycler import Recycler
from actcache.models.sites import Where
from actcache.models.tokenizing import DocumentEncoder, TooLong, check_max_length
from actcache.store.store import open_store


def revision(
    old: Iterable[Document],
    new: Iterable[Document],
    model: str,
    *,
    layer: Where = 1,
    dtype: str | None = None,
    max_length: int | None = None,
    too_long: TooLong | None = None,
    store: str | None = None,
) -> Revision:
    """Say what the documents of a revision share with the old ones, as a model at a layer or site takes them.

    Nothing is computed but, without a store, the width of its rows; the texts are streamed, a key of each passage held.

    Args:
        too_long: how they are cut; None for windows of as many tokens as the model takes, so that nothing is left out.
        dtype: how rows are stored; None for the family's own.
        store: where the old documents have to be.

    Raises:
        MissingEntryError: they are not there.
        ModelError, LayerError, RecipeError, DocumentError: see ``Recycler``, and ``Recycler.fill``.
    """
    loaded = load_pretrained(model, [], "cpu", None)
    base = base_model_of(loaded[0])
    family = family_of(base)
    longest = check_max_length(max_length, loaded[1], family.max_tokens(base.config))
    if too_long is None:
        too_long = "refuse" if longest is None else Windows(longest)
    if store is not None:
        options: dict[str, Any] = {"dtype": dtype, "max_length": max_length, "too_long": too_long}
        place: dict[str, Any] = {"layer": layer} if isinstance(layer, int) or layer == "last" else {"site": str(layer)}
        try:
            with (
                open_store(store, mode="r") as opened,
                Recycler(loaded[0], loaded[1], store=opened, **place, **options) as recycler,
            ):
                return recycler.revision(old, new)
        except (StoreNotFoundError, SpaceNotFoundError) as error:
            raise MissingEntryError(f"the documents that were revised are not stored: {error}") from error
    encoder = DocumentEncoder(loaded[1], longest, too_long)
    before, after = outline_of(encoder, old), outline_of(encoder, new)
    return compare(before, after, row_bytes(LowerHalf(base, family, layer).hidden_size, dtype or family.dtype))
