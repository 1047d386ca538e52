"""Range reads of S3 through obstore, which takes a fifth of the processor time of s3fs (docs/decisions/0004)."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import botocore.session
import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from actcache.errors import StorageIOError
from actcache.segments.places.objects.client import Body, Data, TransientError
from actcache.segments.places.objects.s3 import CREDENTIALS, S3Client, failure

_STATUS = re.compile(r"non-2xx status code: (\d+)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_CREDENTIALS_SECONDS = 300  # after which they are asked for again
#: obstore's threads do not survive a fork, and a child that calls it waits for ever: such a process uses s3fs.
_PROCESS = os.getpid()


def usable() -> bool:
    """Return whether this process may call obstore."""
    return os.getpid() == _PROCESS


class FastClient(S3Client):
    """An ``S3Client`` that reads through obstore, with the endpoint, region and credentials that s3fs found."""

    def __init__(self, bucket: str, prefix: str, options: dict[str, Any], timeout: float) -> None:
        super().__init__(bucket, prefix, options, timeout)
        self._options = options
        self._store: S3Store | None = None
        self._lock = threading.Lock()

    def get(self, key: str, offset: int, nbytes: int, size: int | None = None) -> Body:
        what = f"cannot read {self.where}/{key}"
        store = self._store or self._open()
        try:
            answer = obstore.get(store, self._prefix + key, options={"range": (offset, offset + nbytes)})
            whole = answer.meta["size"]
            data: Data = memoryview(answer.bytes())
        except (BaseError, FileNotFoundError) as error:
            return self._failed(error, key, offset, nbytes, what)
        if len(data) != max(0, min(nbytes, whole - offset)):
            raise TransientError(f"{what}: got {len(data)} of {nbytes} bytes")
        return Body(data, whole)

    def _failed(self, error: Exception, key: str, offset: int, nbytes: int, what: str) -> Body:
        text = str(error)
        status, code, message = (found[1] if (found := p.search(text)) else "" for p in (_STATUS, _CODE, _MESSAGE))
        if not status:
            raise TransientError(f"{what}: {text.splitlines()[0][:300]}") from error
        if status == "416" or status.startswith("3"):
            return super().get(key, offset, nbytes)  # which asks for the size, and follows to another region
        bucket = f"{self._bucket} at {self.endpoint()[0]}"
        raise failure(int(status), code, message, what, bucket, writing=False) from error

    def _open(self) -> S3Store:
        endpoint, region = self.endpoint()
        with self._lock:
            if self._store is None:
                anonymous = {"skip_signature": True}
                signing: dict[str, Any] = anonymous if self.fs.anon else {"credential_provider": self._credentials()}
                self._store = S3Store(
                    self._bucket,
                    endpoint=endpoint,
                    region=region or "us-east-1",
                    virtual_hosted_style_request=False,
                    client_options={
                        "allow_http": endpoint.startswith("http:"),
                        "connect_timeout": timedelta(seconds=min(self._timeout, 10)),
                        "timeout": timedelta(seconds=3 * self._timeout),
                        "read_timeout": timedelta(seconds=self._timeout),
                    },
                    retry_config={"max_retries": 0},
                    **signing,
                )
            return self._store

    def _credentials(self) -> Callable[[], dict[str, Any]]:
        """Return what obstore calls for credentials: those given, or those of the ordinary AWS configuration."""
        given = self._options
        if given.get("key"):
            keys = {
                "access_key_id": given["key"],
                "secret_access_key": given.get("secret"),
                "token": given.get("token"),
            }
            return lambda: {**keys, "expires_at": None}
        found = botocore.session.Session(profile=given.get("profile")).get_credentials()
        if found is None:
            raise StorageIOError(f"there are no credentials for {self.where}; {CREDENTIALS}")

        def ask() -> dict[str, Any]:
            frozen = found.get_frozen_credentials()
            keys = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "token": frozen.token}
            return {**keys, "expires_at": datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_SECONDS)}

        return ask

    def close(self) -> None:
        self._store = None
        super().close()
