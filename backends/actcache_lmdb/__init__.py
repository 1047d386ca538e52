"""The lmdb backend: one LMDB environment a space, a transaction per block, one value per entry.

For one machine's local disk. Reads need no LMDB call per entry: an entry is one extent of the file, and its rows are
gathered from LMDB's own mapping inside of a read transaction. docs/format.md describes the records.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actcache.backend import GRACE_SECONDS, Columns, SpaceDriver, SpaceEngine
from actcache.errors import BackendError, StoreError
from actcache.io.files import is_local
from actcache_lmdb.driver import LMDBSpace

_LEAST_MAP = 1 << 16


class LMDBEngine(SpaceEngine):
    """Keeps each space in an LMDB environment. Thread-safe.

    Options:
        grace: seconds that replaced and deleted entries stay readable for older snapshots (default 600).
        map_size: bytes of addresses to begin with; only needed where they are scarce. The map grows by itself.
        examine: whether the structure of a data file is checked by another process before it is mapped (default
            False): damage there can end the process that reads it. It takes as long as reading the whole tree.
    """

    name = "lmdb"
    options = frozenset({"examine", "grace", "map_size"})
    locks = frozenset({"lock.mdb"})

    def check_folder(self, root: Path) -> None:
        if not is_local(root):
            raise StoreError(
                f"{root} lies on a network file system, where LMDB loses data; use hdf5: there, or a local disk"
            )

    def open(self, folder: Path, columns: Columns, *, writable: bool, options: Mapping[str, Any]) -> SpaceDriver:
        grace, map_size = options.get("grace", GRACE_SECONDS), options.get("map_size")
        if not isinstance(grace, int | float) or not grace >= 0:
            raise BackendError(f"grace is a number of seconds, not {grace!r}")
        if map_size is not None and (not isinstance(map_size, int) or map_size < _LEAST_MAP):
            raise BackendError(f"map_size is a number of bytes, {_LEAST_MAP} or more, not {map_size!r}")
        examine = bool(options.get("examine", False))
        return LMDBSpace(folder, columns, writable=writable, grace=float(grace), map_size=map_size, examine=examine)


backend = LMDBEngine()
