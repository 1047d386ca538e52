"""S3 through s3fs: it brings configuration, credentials and the event loop; the requests are made with its client.

s3fs's own retries are switched off, and botocore's: ``Retrying`` decides, and looks for lost answers.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import botocore.exceptions as boto
import s3fs
from aiobotocore.session import AioSession
from aiohttp import ClientError as HTTPError
from botocore.loaders import create_loader
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

from actcache.errors import OutOfSpaceError, ReadOnlyError, StorageIOError, StoreNotFoundError
from actcache.segments.places.objects import client
from actcache.segments.places.objects.generic import leave_to_parent

T = TypeVar("T")

_TOKEN = "actcache-upload"
_CLOSE_SECONDS = 5.0
_PAGE = 1000  # keys of a listing
_LOADER = create_loader()  # of botocore's tables: 0.1 s to read, 0.01 s a client afterwards
_SLOWEST = 100_000  # bytes a second; a transfer that is slower is given up
CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give profile=..., key= and secret=, or anon=True"
#: Failures to find credentials or to make sense of the configuration.
_UNCONFIGURED = (
    *(boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.ProfileNotFound),
    *(boto.ParamValidationError, boto.InvalidConfigError, boto.ConfigParseError, boto.ConfigNotFound),
    *(boto.UnauthorizedSSOTokenError, boto.SSOTokenLoadError, boto.InvalidRegionError, boto.NoRegionError),
)
_AGAIN = {
    *("InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"),
    *("RequestLimitExceeded", "OperationAborted", "ConditionalRequestConflict", "IncompleteBody", "BadDigest"),
    *("TooManyRequests", "Busy", "XAmzContentSHA256Mismatch"),
}
_KEYS = {
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"),
    *("InvalidSecurity", "NotSignedUp", "InvalidSignature"),
}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "InsufficientCapacity"}
#: Answers to what a server does not do, or does not let these credentials do.
_NOT_FOR_US = (403, 405, 501)
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}


class S3Client(client.Client):
    """A client by s3fs, whose options it takes. Thread-safe; belongs to the process that made it.

    The prefix is empty or ends with a slash. ``timeout`` seconds without a byte end an attempt.
    """

    multipart = True

    def __init__(self, bucket: str, prefix: str, options: dict[str, Any], timeout: float) -> None:
        self.where = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket, self._prefix, self._timeout, self._closed = bucket, prefix, timeout, False
        config = {
            "connect_timeout": min(timeout, 10),
            "read_timeout": timeout,
            "max_pool_connections": 64,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            # Checksums that AWS added later, and that other servers may not know. Entries have their own.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
        options = {**options, "config_kwargs": config | options.get("config_kwargs", {})}
        with self._translated("cannot set up s3fs"):
            session = AioSession(profile=options.pop("profile", None))
            session.register_component("data_loader", _LOADER)
            self.fs = s3fs.S3FileSystem(**options, session=session, skip_instance_cache=True, use_listings_cache=False)
            self._loop = self.fs.loop  # which it refuses to tell in a fork's child
        self.fs.retries = 1

    def endpoint(self) -> tuple[str, str | None]:
        """Return the URL of the endpoint and the region, after the whole configuration of AWS was looked at."""

        async def ask(s3: Any) -> tuple[str, str | None]:
            return str(s3.meta.endpoint_url), s3.meta.region_name

        return self._do("connect", "", ask)

    def get(self, key: str, offset: int, nbytes: int, size: int | None = None) -> client.Body:
        async def ask(s3: Any) -> client.Body:
            try:
                answer = await s3.get_object(**self._object(key), Range=f"bytes={offset}-{offset + nbytes - 1}")
            except boto.ClientError as error:
                if _status(error) != 416:
                    raise
                answer = await s3.head_object(**self._object(key))  # nothing lies there
                return client.Body(b"", int(answer["ContentLength"]))
            async with answer["Body"] as stream:
                data = await stream.read()
            whole = int(answer.get("ContentRange", "/-1").rpartition("/")[2])
            if whole < 0:  # a server that knows no ranges sends everything
                data, whole = data[offset : offset + nbytes], len(data)
            if len(data) != max(0, min(nbytes, whole - offset)):
                raise client.TransientError(f"cannot read {self.where}/{key}: got {len(data)} of {nbytes} bytes")
            return client.Body(data, whole)

        return self._do("read", key, ask, nbytes)

    def head(self, key: str) -> client.Head:
        async def ask(s3: Any) -> client.Head:
            answer = await s3.head_object(**self._object(key))
            age = _seconds(answer["LastModified"], _now(answer))
            return client.Head(int(answer["ContentLength"]), age, answer.get("Metadata", {}).get(_TOKEN))

        return self._do("look at", key, ask)

    def listing(self, prefix: str, *, recursive: bool) -> client.Listing:
        async def ask(s3: Any) -> client.Listing:
            files: dict[str, client.Head] = {}
            folders: set[str] = set()
            options: dict[str, Any] = {"MaxKeys": _PAGE} | ({} if recursive else {"Delimiter": "/"})
            while True:
                page = await s3.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + prefix, **options)
                now = _now(page)
                for found in page.get("Contents", ()):
                    age = _seconds(found["LastModified"], now)
                    files[found["Key"].removeprefix(self._prefix)] = client.Head(int(found["Size"]), age)
                folders.update(f["Prefix"].removeprefix(self._prefix) for f in page.get("CommonPrefixes", ()))
                if not page.get("IsTruncated"):
                    return client.Listing(files, frozenset(folders))
                options["ContinuationToken"] = page["NextContinuationToken"]

        return self._do("list", prefix, ask, 1 << 30)

    def put(self, key: str, data: client.Data, token: str, *, create: bool) -> None:
        digest = hashlib.md5(data, usedforsecurity=False)
        options: dict[str, Any] = {"Metadata": {_TOKEN: token}, "ContentMD5": _base64(digest), **_condition(create)}
        answer = self._write(key, "put_object", len(data), Body=bytes(data), **options)
        if _etag(answer) != digest.hexdigest():  # of an encrypted object, say, it is no MD5
            self._check_size(key, len(data))

    def begin(self, key: str, token: str) -> str:
        return str(self._write(key, "create_multipart_upload", Metadata={_TOKEN: token})["UploadId"])

    def part(self, key: str, upload: str, number: int, data: client.Data) -> str:
        digest = _base64(hashlib.md5(data, usedforsecurity=False))
        which: dict[str, Any] = {"UploadId": upload, "PartNumber": number, "ContentMD5": digest}
        return str(self._write(key, "upload_part", len(data), Body=bytes(data), **which)["ETag"])

    def complete(self, key: str, upload: str, etags: Sequence[str], token: str, *, create: bool) -> None:
        parts = {"Parts": [{"ETag": etag, "PartNumber": number} for number, etag in enumerate(etags, 1)]}
        options: dict[str, Any] = {"UploadId": upload, "MultipartUpload": parts, **_condition(create)}
        # Stores put the parts together before they answer, and some send blanks meanwhile.
        self._write(key, "complete_multipart_upload", 1 << 28, **options)

    def _check_size(self, key: str, nbytes: int) -> None:
        """Raise ``TransientError``, and remove the object, where the store has not got all of it."""
        if (size := self.head(key).size) != nbytes:
            self.remove(key)
            raise client.TransientError(f"cannot write {self.where}/{key}: the store has {size} of {nbytes} bytes")

    def abort(self, key: str, upload: str) -> None:
        self._write(key, "abort_multipart_upload", verb="abort the upload of", UploadId=upload)

    def uploads(self) -> list[client.Upload]:
        async def ask(s3: Any) -> list[client.Upload]:
            found: list[client.Upload] = []
            after: dict[str, str] = {}
            while True:
                try:
                    page = await s3.list_multipart_uploads(Bucket=self._bucket, Prefix=self._prefix, **after)
                except boto.ClientError as error:
                    if (status := _status(error)) not in _NOT_FOR_US:
                        raise
                    raise client.UnsupportedError(f"{self.where} lists none (status {status})") from error
                now = _now(page)
                for upload in page.get("Uploads", ()):
                    key, age = upload["Key"].removeprefix(self._prefix), _seconds(upload["Initiated"], now)
                    found.append(client.Upload(key, upload["UploadId"], age))
                if not page.get("IsTruncated"):
                    return found
                after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

        return self._do("list the uploads of", "", ask, 1 << 30)

    def copy(self, key: str, target: str) -> None:
        async def ask(s3: Any) -> None:
            # s3fs copies what is larger than 5 GB in parts
            await self.fs._cp_file(f"{self._bucket}/{self._prefix}{key}", f"{self._bucket}/{self._prefix}{target}")

        self._do("copy", key, ask, 1 << 30, writing=True)

    def remove(self, key: str) -> None:
        self._write(key, "delete_object", verb="remove")

    def abandon(self) -> None:
        leave_to_parent(self.fs, self._loop)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            creator = getattr(self.fs, "_s3creator", None)
            if creator is not None and self._loop.is_running():
                with suppress(FSTimeoutError, OSError, HTTPError):
                    sync(self._loop, creator.__aexit__, None, None, None, timeout=_CLOSE_SECONDS)

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _write(self, key: str, operation: str, nbytes: int = 0, *, verb: str = "write", **options: Any) -> Any:
        """Call an operation of S3 that changes an object; return what it answers."""

        async def ask(s3: Any) -> Any:
            return await getattr(s3, operation)(**self._object(key), **options)

        return self._do(verb, key, ask, nbytes, writing=True)

    def _do(
        self, verb: str, key: str, ask: Callable[[Any], Awaitable[T]], nbytes: int = 0, *, writing: bool = False
    ) -> T:
        """Run a request on the event loop; it ends in bounded time."""

        async def run() -> T:
            async with asyncio.timeout(3 * self._timeout + nbytes / _SLOWEST):
                return await ask(await self.fs.set_session())

        with self._translated(f"cannot {verb} {self.where}/{key}", writing=writing):
            result: T = sync(self._loop, run)
            return result

    @contextmanager
    def _translated(self, what: str, *, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except boto.ClientError as error:
            raise self._answer(error, what, writing) from error
        except _UNCONFIGURED as error:
            raise StorageIOError(f"{what}: {error}; {CREDENTIALS}") from error
        except StorageIOError:
            raise
        except (boto.BotoCoreError, boto.HTTPClientError, HTTPError, FSTimeoutError, TimeoutError, OSError) as error:
            if isinstance(answer := error.__cause__, boto.ClientError):  # s3fs's own methods make OSErrors of these
                raise self._answer(answer, what, writing) from error
            if isinstance(error, FileNotFoundError):
                raise client.ObjectNotFoundError(what) from error
            raise client.TransientError(f"{what}: {str(error) or type(error).__name__}") from error
        except RuntimeError as error:  # the session was closed under the request
            raise client.TransientError(f"{what}: {error!r:.200}") from error
        except (ValueError, KeyError, TypeError) as error:  # an endpoint that is no URL, an answer without sense
            raise StorageIOError(f"{what}: {error!r:.200}; check endpoint_url") from error

    def _answer(self, error: boto.ClientError, what: str, writing: bool) -> Exception:
        said = error.response.get("Error", {})
        code, message = str(said.get("Code", "")), str(said.get("Message", ""))
        bucket = f"{self._bucket} at {self.fs.endpoint_url or 'the configured endpoint'}"
        return failure(_status(error), code, message, what, bucket, writing=writing)


def _base64(digest: Any) -> str:
    return base64.b64encode(digest.digest()).decode()


def _etag(answer: dict[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"').lower()


def _condition(create: bool) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if create else {}


def _status(error: boto.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _seconds(begin: datetime, end: datetime) -> float:
    return max(0.0, (end - begin).total_seconds())  # servers round one up and the other down


def _now(answer: dict[str, Any]) -> datetime:
    """Return the server's time."""
    try:
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError, TypeError):
        return datetime.now(UTC)


def failure(status: int, code: str, message: str, what: str, bucket: str, *, writing: bool) -> Exception:
    """Return the exception that an answer of a store stands for.

    ``status`` is HTTP's, or 0; ``what`` the request, such as ``"cannot read s3://bucket/key"``; ``bucket`` has the
    endpoint, too.
    """
    said = f"{code or status}{f': {message[:200]}' if message else ''}"
    if code == "NoSuchBucket":
        return StoreNotFoundError(f"{what}: there is no bucket {bucket}; create it, or check its name and endpoint_url")
    if code in ("NoSuchKey", "NoSuchUpload", "NotFound") or status == 404:
        return client.ObjectNotFoundError(what)
    if code in _AGAIN:
        return client.TransientError(f"{what}: {said}")
    if code == "PreconditionFailed" or status == 412:
        return client.ObjectExistsError(what)
    if code in _FULL or status == 507:
        return OutOfSpaceError(f"{what}: the store or quota is full ({said}); free some space and flush again")
    if code == "RequestTimeTooSkewed":
        return StorageIOError(f"{what}: this machine's clock differs too much from the store's; set it right")
    if code in _KEYS or status == 401:
        return StorageIOError(
            f"{what}: {bucket} does not know these credentials ({said}); check key and secret, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the profile"
        )
    if code in _ELSEWHERE or status in (301, 307):
        return StorageIOError(f"{what}: the bucket is in another region ({said}); give region=...")
    if status == 403:
        if writing:
            return ReadOnlyError(f"{what}: {bucket} does not let these credentials write ({said}); read with mode='r'")
        return StorageIOError(
            f"{what}: {bucket} refuses these credentials ({said}); check which they are, what they may do, and "
            "the bucket's name"
        )
    if status in (405, 501):
        return client.UnsupportedError(f"{what}: {bucket} does not do that ({said})")
    if status >= 500 or status in (408, 429):
        return client.TransientError(f"{what}: {said}")
    return StorageIOError(f"{what}: {bucket} answers {said}")
