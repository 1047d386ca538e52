"""Object stores for the tests: moto's server over real HTTP, and a real S3 server where one is named.

``ACTCACHE_S3_ENDPOINT`` names a server, with the ordinary ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``;
``.ci/run`` starts one. Every test has a bucket of its own.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import botocore.session
import pytest
from botocore.config import Config

from tests.segments.objects.proxy import Proxy

REAL = os.environ.get("ACTCACHE_S3_ENDPOINT", "")
REAL_KEYS = {"key": os.environ.get("AWS_ACCESS_KEY_ID", ""), "secret": os.environ.get("AWS_SECRET_ACCESS_KEY", "")}


@dataclass(frozen=True)
class Server:
    """An S3 server, and the options that reach it."""

    endpoint: str
    keys: dict[str, str]
    name: str

    def client(self) -> Any:
        """botocore's plain client, which is none of ours."""
        return botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.keys["key"],
            aws_secret_access_key=self.keys["secret"],
            config=Config(s3={"addressing_style": "path"}),
        )


@dataclass
class Bucket:
    server: Server
    name: str
    s3: Any = field(repr=False)

    @property
    def url(self) -> str:
        return f"s3://{self.name}/some/store"

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": self.server.endpoint, "region": "us-east-1", **self.server.keys}

    def through(self, proxy: Proxy) -> dict[str, Any]:
        return {**self.options, "endpoint_url": proxy.endpoint}

    def listed(self, prefix: str = "") -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def remove(self) -> None:
        for upload in self.s3.list_multipart_uploads(Bucket=self.name).get("Uploads", ()):
            self.s3.abort_multipart_upload(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])
        while keys := [{"Key": key} for key in self.listed()[:1000]]:
            self.s3.delete_objects(Bucket=self.name, Delete={"Objects": keys, "Quiet": True})
        self.s3.delete_bucket(Bucket=self.name)

    def uploads(self) -> list[str]:
        return [u["Key"] for u in self.s3.list_multipart_uploads(Bucket=self.name).get("Uploads", ())]


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield Server(f"http://{host}:{port}", {"key": "test", "secret": "test"}, "moto")
    server.stop()


@pytest.fixture(params=["moto", *(["real"] if REAL else [])], scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    if request.param == "real":
        return Server(REAL, REAL_KEYS, "real")
    found: Server = request.getfixturevalue("moto")
    return found


def _without_amazon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def plain_client(server: Server) -> Iterator[Any]:
    """One for all tests: making it takes as long as many requests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _without_amazon(monkeypatch)
        s3 = server.client()
    yield s3
    s3.close()


@pytest.fixture
def bucket(server: Server, plain_client: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    _without_amazon(monkeypatch)
    s3 = plain_client
    found = Bucket(server, f"actcache-{uuid.uuid4().hex[:16]}", s3)
    s3.create_bucket(Bucket=found.name)
    yield found
    found.remove()


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[Proxy]:
    with Proxy(bucket.server.endpoint) as found:
        yield found
