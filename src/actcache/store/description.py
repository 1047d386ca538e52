"""What a store says of a space: its recipe, in the blob ``spaces/<fingerprint>/recipe.json``."""

from __future__ import annotations

import json

from actcache.backend import StoreDriver
from actcache.errors import FormatError, FormatVersionError
from actcache.format.recipe import Recipe

SPACE_VERSION = 4  # the newest; a recipe says which one it takes


def space_blob(fingerprint: str, name: str) -> str:
    """Return the name that a blob of a space has in the store."""
    return f"spaces/{fingerprint}/{name}"


def write_recipe(driver: StoreDriver, recipe: Recipe) -> bool:
    """Make sure that a space's recipe stands in the store, durably; return whether it was missing.

    A space that was deleted while somebody wrote to it begins anew with what is written afterwards.
    """
    name = space_blob(recipe.fingerprint, "recipe.json")
    if driver.read_blob(name) is not None:
        return False
    text = json.dumps({"format_version": recipe.format_version, **recipe.to_json()}, indent=1)
    return driver.write_blob(name, text.encode() + b"\n", replace=False)


def read_recipe(driver: StoreDriver, fingerprint: str, store: str) -> Recipe | None:
    """Return the recipe of a space, None where it has none: it is being made, or was deleted.

    Raises:
        FormatError, FormatVersionError: the description (named as of ``store``) is damaged or newer than this release.
    """
    name = space_blob(fingerprint, "recipe.json")
    data = driver.read_blob(name)
    if data is None:
        return None
    try:
        description = json.loads(data)
        version = description["format_version"]
        if not isinstance(version, int):
            raise TypeError(f"its format version is {version!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{store}: {name} is damaged: {error}") from None
    if version > SPACE_VERSION:
        raise FormatVersionError(
            f"{store}: {name} has format version {version}, newer than this release: upgrade actcache"
        )
    recipe = Recipe.from_json(description)
    if recipe.fingerprint != fingerprint:
        raise FormatError(f"{store}: {name} describes another space ({recipe.fingerprint}); restore it from a copy")
    return recipe
