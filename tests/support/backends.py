"""The backends that keep a store in a folder of this machine, for the tests of reliability: another one is a line."""

from __future__ import annotations

import functools
from collections.abc import Container
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest

from actcache.segments import registry

_BOTH_WAYS = ({"mapped": True}, {"mapped": False})


@dataclass(frozen=True)
class Kind:
    """One backend.

    Attributes:
        library: the module without which it cannot work.
        segmented: whether its entries lie in segments of the core; else it keeps files in its own way.
        options: ways to open a store, each of which reads on a path of its own.
    """

    name: str
    library: str
    segmented: bool = True
    options: tuple[dict[str, Any], ...] = _BOTH_WAYS

    def url(self, path: Any) -> str:
        return f"{self.name}:{path}"

    @functools.cached_property  # which a frozen class may have
    def installed(self) -> bool:
        return self.name in registry.backends() and find_spec(self.library) is not None


KINDS = {
    kind.name: kind
    for kind in (
        Kind("hdf5", "h5py"),
        Kind("zarr", "zarr"),
        Kind("safetensors", "actcache_s3"),
        Kind("lmdb", "lmdb", segmented=False, options=({},)),
    )
}


def each(*, segmented: bool = False, everyday: Container[str] = KINDS) -> pytest.MarkDecorator:
    """Run a test with every ``kind`` (only those that keep segments of the core).

    Args:
        everyday: names of those that run every day; the others, which share their code, in the long run.
    """
    kinds = [kind for kind in KINDS.values() if kind.segmented or not segmented]
    marks: dict[str, list[pytest.MarkDecorator]] = {kind.name: [] for kind in kinds}
    for kind in kinds:
        if not kind.installed:
            marks[kind.name].append(pytest.mark.skip(f"{kind.name} is not installed"))
        if kind.name not in everyday:
            marks[kind.name].append(pytest.mark.long)
    return pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name, marks=marks[kind.name]) for kind in kinds])
