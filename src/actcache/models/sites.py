"""Sites: where in a model rows are taken, as people say it and as the input or the output of a module.

A layer is a site with a number. ``layer=6`` is the input of the seventh layer, which is what layer 6 gives together
with whatever the model adds before it goes on; ``layer=0`` is what goes into layer 1, and of N layers ``layer=N`` is
the output of the last one, before the final norm. Any other site is a module by its path.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from actcache.errors import LayerError, UsageError
from actcache.format.arguments import is_whole, whole_numbers
from actcache.format.recipe import Recipe
from actcache.models.families import Family

LAST = "last"  # what the model gives: after the final norm, where there is one
ALL = "all"  # each of the layers 0..N

_NUMBER = re.compile(r"-?[0-9]{1,9}")  # of a layer, as a configuration file or a shell gives it
_INPUT = ":input"
_OUTPUT = ":output"
_SHOWN = 12  # modules that an error names


@dataclass(frozen=True)
class Site:
    """Where rows are taken. Immutable; two are equal where they are the same side of the same module.

    ``str`` of a site is what a recipe holds and ``site_of`` takes.
    """

    module: str  # path from the base model; empty for the base model itself
    side: Literal["input", "output"] = "output"
    layer: int | None = field(default=None, compare=False)  # its number, where it is what a layer gives

    def __str__(self) -> str:
        return (self.module or LAST) + (_INPUT if self.side == "input" else "")

    @property
    def name(self) -> int | str:
        """The number of the layer, or else the site's text: what ``site_of`` takes, too."""
        return str(self) if self.layer is None else self.layer


#: What callers give: the number of a layer, ``"last"``, the path of a module (with ``:input``), or a site.
Where = int | str | Site


def site_of(base_model: PreTrainedModel, family: Family, where: Where) -> Site:
    """Return the site that is meant; raises ``LayerError`` where a model has none such.

    Negative numbers count from the end: of N layers, -1 is N. ``"last"`` is what the model gives. A path may begin with
    what task models call the base model, and ``layers.5`` is the sixth layer whatever the model calls its list.
    """
    if isinstance(where, Site):
        return where
    layers = family.layers_of(base_model)
    count = len(layers)
    if not isinstance(where, str):
        if not is_whole(where) or not -count - 1 <= where <= count:
            raise LayerError(
                f"layer {where!r:.40} is not there: {type(base_model).__name__} has layers 1..{count}. Give 0 (what "
                f"goes into layer 1) to {count}, a negative number to count from the end, or {LAST!r} (after the final "
                "norm)"
            )
        return _of_layer(family, count, int(where) % (count + 1))
    path, side = where.removesuffix(_OUTPUT), "output"
    if path.endswith(_INPUT):
        path, side = path.removesuffix(_INPUT), "input"
    if path == LAST and side == "output":
        return Site("")
    module = _path_of(base_model, family, path)
    for number in (count,) if side == "output" else range(count):
        if (found := _of_layer(family, count, number)).module == module:
            return found
    return Site(module, "input" if side == "input" else "output")


def expanded(base_model: PreTrainedModel, family: Family, places: Iterable[Where]) -> list[Where]:
    """Return what ``several`` returned with each layer in the place of ``"all"``."""
    layers: list[Where] = list(range(len(family.layers_of(base_model)) + 1))
    return [one for where in places for one in (layers if where == ALL else [where])]


def several(layers: Any, sites: Any = ()) -> list[Where]:
    """Return the places that a caller gave as ``layers`` and ``sites``, in that order.

    Layers are whole numbers and ``"last"``, or ``"all"`` in the place of them; sites are texts.

    Raises:
        UsageError: there are none, or one twice, or one is none.
    """
    if isinstance(sites, str) or not all(isinstance(site, str) for site in sites):
        raise UsageError(f"sites are paths of modules, such as ['layers.5.mlp'], not {sites!r:.80}")
    if isinstance(layers, str) and layers == ALL:
        numbers: list[Where] = [ALL]
    else:
        given = (
            []
            if layers is None
            else [layers]
            if is_whole(layers) or (isinstance(layers, str) and layers == LAST)
            else layers
        )
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            raise UsageError(
                f"layers are whole numbers and 'last', such as [3, 6, 'last'], or 'all'; not {layers!r:.80}"
            )
        words = [one for one in given if isinstance(one, str)]
        if words and set(words) <= {LAST}:
            numbers = [one if isinstance(one, str) else int(whole_numbers("layers", [one])[0]) for one in given]
        else:
            numbers = [*whole_numbers("layers", given).tolist()]
    places = [*numbers, *sites]
    if not places or len(set(places)) != len(places):
        raise UsageError(
            f"layers are different numbers, such as [3, 6], 'last' among them, or 'all'; not {layers!r:.80}"
            + (f" with sites {list(sites)!r:.80}" if sites else "")
        )
    return places


def depth_of(base_model: PreTrainedModel, family: Family, site: Site) -> int:
    """Return about how many layers run before a site."""
    count = len(family.layers_of(base_model))
    if site.layer is not None:
        return site.layer
    inside = site.module.removeprefix(f"{family.layers}.")
    number = inside.partition(".")[0]
    return min(int(number) + 1, count) if inside != site.module and number.isdecimal() else count


def chosen(layer: int | str | None, site: str | None) -> int | str:
    """Return which of the two a caller gave; raises ``UsageError`` where that is not one."""
    where = site if layer is None else layer
    if where is None or (layer is not None and site is not None):
        raise UsageError(
            "say where rows are taken by one of layer=6 (0 to the number of layers, or 'last') and "
            f"site='layers.5.mlp', not by layer={layer!r:.40} and site={site!r:.40}"
        )
    return int(layer) if isinstance(layer, str) and _NUMBER.fullmatch(layer) else where


def site_in(base_model: PreTrainedModel, family: Family, recipe: Recipe) -> Site:
    """Return the site of a recipe in a model; raises ``LayerError`` where it has none such."""
    return site_of(base_model, family, where_of(recipe))


def where_of(recipe: Recipe) -> int | str:
    """Return where a recipe's rows are taken: the number of a layer, or a site."""
    where = recipe.site if recipe.layer is None else recipe.layer
    assert where is not None  # a recipe has one of them
    return where


def _of_layer(family: Family, count: int, number: int) -> Site:
    if number == count:
        return Site(f"{family.layers}.{count - 1}", "output", number)
    return Site(f"{family.layers}.{number}", "input", number)


def _path_of(base_model: PreTrainedModel, family: Family, path: str) -> str:
    """Return the first path of the module that is meant."""
    spelled = [path, path.removeprefix(f"{base_model.base_model_prefix}.")]
    if path.startswith("layers."):
        spelled.append(f"{family.layers}.{path.removeprefix('layers.')}")
    for one in spelled:
        module = _submodule(base_model, one) if one else None
        if module is not None:
            found: str = next(name for name, other in base_model.named_modules() if other is module)
            return found.replace("_orig_mod.", "")  # torch.compile's wrappers
    raise LayerError(_unknown(base_model, path, spelled[-1]))


def _submodule(base_model: nn.Module, path: str) -> nn.Module | None:
    try:
        return base_model.get_submodule(path)
    except AttributeError:
        return None


def _unknown(base_model: PreTrainedModel, path: str, meant: str) -> str:
    names = [name for name, _ in base_model.named_modules() if name]
    parent = meant.rpartition(".")[0]
    there = [name for name in names if name.rpartition(".")[0] == parent] or [n for n in names if "." not in n]
    shown = [*dict.fromkeys([*difflib.get_close_matches(meant, names, 3), *there])]
    more = ", ..." if len(shown) > _SHOWN else ""
    return (
        f"{type(base_model).__name__} has no module {path!r}: a site is the path of a module from the base model, with "
        f"{_INPUT} at the end for what it is given. There are {', '.join(shown[:_SHOWN])}{more}"
    )
