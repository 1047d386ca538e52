"""What the failures of an S3 request mean, whichever library reports them."""

from __future__ import annotations

from actcache.errors import OutOfSpaceError, ReadOnlyError, StorageIOError, StoreNotFoundError
from actcache.segments.places.objects.client import ObjectExistsError, ObjectNotFoundError, TransientError

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
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}


def of_answer(status: int, code: str, message: str, what: str, bucket: str, *, writing: bool) -> Exception:
    """Return the exception that an answer of a store stands for.

    Args:
        status: of HTTP; 0 where it is not known.
        code: the error code of S3, such as ``NoSuchKey``.
        what: the request, such as ``"cannot read s3://bucket/key"``.
        bucket: the bucket and endpoint, for messages.
    """
    said = f"{code or status}{f': {message[:200]}' if message else ''}"
    if code == "NoSuchBucket":
        return StoreNotFoundError(f"{what}: there is no bucket {bucket}; create it, or check its name and endpoint_url")
    if code in ("NoSuchKey", "NoSuchUpload", "NotFound") or status == 404:
        return ObjectNotFoundError(what)
    if code == "ConditionalRequestConflict" or code in _AGAIN:
        return TransientError(f"{what}: {said}")
    if code == "PreconditionFailed" or status == 412:
        return ObjectExistsError(what)
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
    if status >= 500 or status in (408, 429):
        return TransientError(f"{what}: {said}")
    return StorageIOError(f"{what}: {bucket} answers {said}")
