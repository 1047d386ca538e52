"""The S3 server that the object store's figures are measured against: one that is named, or moto's on loopback.

A named one is taken from ``ACTCACHE_S3_ENDPOINT`` or ``AWS_ENDPOINT_URL``, with the ordinary ``AWS_ACCESS_KEY_ID`` and
``AWS_SECRET_ACCESS_KEY``. moto's runs in a process of its own, so that its processor time is not the client's.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import botocore.session
from botocore.config import Config

_START_SECONDS = 60.0


@dataclass(frozen=True)
class Bucket:
    """A new bucket on a server, and the options that reach it."""

    name: str
    server: str  # for the reader of the figures
    endpoint: str
    keys: dict[str, str] = field(repr=False)  # key, secret
    _s3: Any = field(repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``actcache.open``."""
        return {"endpoint_url": self.endpoint, "region": "us-east-1", **self.keys}

    def empty(self) -> None:
        for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.name):
            for found in page.get("Contents", ()):
                self._s3.delete_object(Bucket=self.name, Key=found["Key"])


@contextmanager
def bucket() -> Iterator[Bucket]:
    """A bucket on the server that is named, or else on moto's; it is gone afterwards."""
    named = os.environ.get("ACTCACHE_S3_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL")
    if named:
        yield from _bucket(named, f"the server at {named}")
        return
    with _moto() as endpoint:
        yield from _bucket(endpoint, f"moto's server at {endpoint} (a mock; ACTCACHE_S3_ENDPOINT names a real one)")


def _bucket(endpoint: str, server: str) -> Iterator[Bucket]:
    keys = {
        "key": os.environ.get("AWS_ACCESS_KEY_ID", "test"),
        "secret": os.environ.get("AWS_SECRET_ACCESS_KEY", "test"),
    }
    s3 = botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=keys["key"],
        aws_secret_access_key=keys["secret"],
        config=Config(s3={"addressing_style": "path"}),
    )
    made = Bucket(f"actcache-bench-{uuid.uuid4().hex[:12]}", server, endpoint, keys, s3)
    s3.create_bucket(Bucket=made.name)
    try:
        yield made
    finally:
        made.empty()
        s3.delete_bucket(Bucket=made.name)


@contextmanager
def _moto() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
