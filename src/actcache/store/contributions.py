"""Who computed what of a space: each process of a fill by several notes in the store what it has stored.

A note is a small file, ``spaces/<fingerprint>/fills/<run>-<partition>-<attempt>.json``, written anew after each segment
that is published: what a killed process had stored is known afterwards, but for what it published in its last
moment.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from actcache.backend import StoreDriver
from actcache.io.notebook import Shown
from actcache.store.description import space_blob

logger = logging.getLogger(__name__)

FOLDER = "fills"
_MOST_FILES = 64  # that are left to lie beside each other


@dataclass(frozen=True)
class Contribution(Shown):
    """What one process has stored in a space."""

    space: str  # its fingerprint
    run: str  # of one fill all processes have the same, where somebody leads them
    partition: str  # "3/8": its share of the documents
    attempt: int  # 0; 1 where the first process of this share died, ...
    worker: str  # its host, process id and device
    began: str  # when, in UTC
    seconds: float  # until it stored something last
    entries: int
    tokens: int
    nbytes: int  # before compression
    segments: int  # that it published

    @property
    def name(self) -> tuple[str, str, int]:
        return self.run, self.partition, self.attempt


def blob_name(one: Contribution) -> str:
    return f"{FOLDER}/{one.run}-{one.partition.replace('/', 'of')}-{one.attempt}.json"


def dumps(found: Sequence[Contribution]) -> bytes:
    return json.dumps({"contributions": [asdict(one) for one in found]}, indent=1).encode() + b"\n"


def read(driver: StoreDriver, fingerprint: str) -> list[Contribution]:
    """Return what all processes have noted, in the order in which they began. Damaged notes are passed over."""
    best: dict[tuple[str, str, int], Contribution] = {}
    for _, some in _files(driver, fingerprint):
        for one in some:
            if one.name not in best or one.segments > best[one.name].segments:
                best[one.name] = one
    return sorted(best.values(), key=lambda one: (one.began, one.name))


def merge(driver: StoreDriver, fingerprint: str) -> None:
    """Make one file of many; nothing is lost where others note, or merge, meanwhile."""
    files = _files(driver, fingerprint)
    if len(files) > _MOST_FILES:
        name = space_blob(fingerprint, f"{FOLDER}/{secrets.token_hex(8)}.json")
        driver.write_blob(name, dumps(read(driver, fingerprint)), replace=True)
        for old, _ in files:
            driver.delete_blob(old)


def _files(driver: StoreDriver, fingerprint: str) -> list[tuple[str, list[Contribution]]]:
    found = []
    for name in driver.blobs(space_blob(fingerprint, FOLDER)):
        if (data := driver.read_blob(name)) is None:
            continue
        try:
            found.append((name, [_checked(one) for one in json.loads(data)["contributions"]]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("%s is damaged and passed over: %s", name, error)
    return found


def _checked(given: dict[str, object]) -> Contribution:
    kinds = {"int": int, "float": (int, float), "str": str}
    for one in fields(Contribution):
        if not isinstance(given[one.name], kinds[str(one.type)]):  # type: ignore[arg-type]
            raise TypeError(f"{one.name} is {given[one.name]!r:.40}")
    return Contribution(**{one.name: given[one.name] for one in fields(Contribution)})  # type: ignore[arg-type]
