"""What a store holds, as plain data: the library side of ``cachectl inspect``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from actcache.backend import Usage
from actcache.recipe import Recipe
from actcache.store import Store


@dataclass(frozen=True)
class SpaceReport:
    """One space: its recipe, what it holds, and which of its segments could not be read (name -> what is wrong)."""

    recipe: Recipe
    usage: Usage
    damaged: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "fingerprint": self.recipe.fingerprint,
            **self.recipe.to_json(),
            **asdict(self.usage),
            "damaged": self.damaged,
        }


def inspect(store: Store) -> list[SpaceReport]:
    """Describe every space of a store, in the order of their fingerprints. Reads keys, no activations.

    Raises:
        FormatError, FormatVersionError: a space's own description is damaged or newer than this release.
    """
    reports = []
    for recipe in store.recipes():
        space = store.space(recipe)
        try:
            reports.append(SpaceReport(space.recipe, space.usage(), space.damaged()))
        finally:
            space.close()
    return reports
