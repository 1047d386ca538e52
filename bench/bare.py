"""What the bare client libraries reach against an object store: the limits of the s3 backend.

Reads: exactly the ranges that the store asks for, by obstore, with the store's own number of requests in flight, copied
one after another into one buffer. Writes: the same bytes as objects of the same sizes, in parts of the same size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import obstore
import s3fs
from obstore.store import S3Store

from actcache.segments.places.objects.client import Client
from actcache.segments.places.objects.options import Target
from actcache.segments.places.objects.session import IN_FLIGHT
from bench.server import Bucket

PART_BYTES = 16 << 20
PARTS_AT_A_TIME = 4

#: An object's key, the first byte, the number of bytes.
Range = tuple[str, int, int]


class Requests:
    """Notes the requests that stores make which are opened from now on, until ``stop``. One object at a time."""

    def __init__(self) -> None:
        self.count = 0  # of all kinds
        self.ranges: list[Range] = []  # keys relative to the store's root
        self._connect = Target.connect
        Target.connect = lambda target: _Noting(self._connect(target), self)

    def stop(self) -> None:
        Target.connect = self._connect


class _Noting:
    """A client whose requests are noted; each call is one."""

    def __init__(self, client: Client, requests: Requests) -> None:
        self._client = client
        self._requests = requests

    def get(self, key: str, offset: int, nbytes: int) -> Any:
        self._requests.count += 1
        self._requests.ranges.append((key, offset, nbytes))
        return self._client.get(key, offset, nbytes)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if name in ("head", "listing", "put", "begin", "part", "complete", "abort", "uploads", "copy", "remove"):
            self._requests.count += 1
        return found


class Bare:
    """obstore and s3fs, straight."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._path = f"{bucket.name}/"
        self._prefix = prefix
        self._fast = S3Store(
            bucket.name,
            endpoint=bucket.endpoint,
            region="us-east-1",
            access_key_id=bucket.keys["key"],
            secret_access_key=bucket.keys["secret"],
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        self._slow = s3fs.S3FileSystem(
            endpoint_url=bucket.endpoint,
            **bucket.keys,
            client_kwargs={"region_name": "us-east-1"},
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        self._pool = ThreadPoolExecutor(IN_FLIGHT)
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        self._pool.shutdown()
        self._loop.close()

    def reads(self) -> dict[str, Callable[[list[Range], np.ndarray], None]]:
        """Return the ways to read ranges, one after another, into a buffer of bytes."""
        return {f"obstore, {IN_FLIGHT} threads": self._threads, f"obstore, asyncio x{IN_FLIGHT}": self._tasks}

    def writes(self) -> dict[str, Callable[[str, bytes], None]]:
        """Return the ways to write an object."""
        return {"obstore, multipart": self._put, "s3fs, multipart": self._pipe}

    def _threads(self, ranges: list[Range], out: np.ndarray) -> None:
        def read(key: str, offset: int, nbytes: int, at: int) -> None:
            data = obstore.get_range(self._fast, self._prefix + key, start=offset, length=nbytes)
            out[at : at + nbytes] = np.frombuffer(data, np.uint8)

        list(self._pool.map(lambda what: read(*what), _placed(ranges)))

    def _tasks(self, ranges: list[Range], out: np.ndarray) -> None:
        free = asyncio.Semaphore(IN_FLIGHT)

        async def read(key: str, offset: int, nbytes: int, at: int) -> None:
            async with free:
                data = await obstore.get_range_async(self._fast, self._prefix + key, start=offset, length=nbytes)
                out[at : at + nbytes] = np.frombuffer(data, np.uint8)

        async def all_of_them() -> None:
            await asyncio.gather(*(read(*what) for what in _placed(ranges)))

        self._loop.run_until_complete(all_of_them())

    def _put(self, key: str, data: bytes) -> None:
        key = self._prefix + key
        obstore.put(self._fast, key, data, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_A_TIME)

    def _pipe(self, key: str, data: bytes) -> None:
        self._slow.pipe_file(f"{self._path}{self._prefix}{key}", data, PART_BYTES, max_concurrency=PARTS_AT_A_TIME)


def _placed(ranges: list[Range]) -> list[tuple[str, int, int, int]]:
    ends = np.cumsum([nbytes for _, _, nbytes in ranges]).tolist()
    return [(key, offset, nbytes, end - nbytes) for (key, offset, nbytes), end in zip(ranges, ends, strict=True)]
