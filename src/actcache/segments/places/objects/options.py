"""From a URL and keyword options to a client."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from actcache.errors import BackendError, MissingExtraError
from actcache.segments.places.objects import protocols
from actcache.segments.places.objects.client import Client
from actcache.segments.places.objects.generic import FsspecClient

_S3 = {"s3", "s3a"}
_OURS = {"retry_seconds": 60.0, "timeout": 20.0}
_OF_S3FS = {
    *("anon", "endpoint_url", "key", "secret", "token", "profile", "use_ssl", "client_kwargs", "config_kwargs"),
    *("requester_pays", "s3_additional_kwargs", "cache_regions"),
}
_KNOWN_S3 = _OF_S3FS | {"region", "client"}
_CLIENTS = ("obstore", "s3fs")
_BUCKET = re.compile(r"[A-Za-z0-9._-]+")
#: Control characters, lone surrogates, separators of lines and paragraphs.
_STRANGE = {"Cc", "Cs", "Zl", "Zp"}
_LONGEST = 800  # bytes of a prefix: an object's key has 1,024, and the longest below a store's prefix about 150
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_SECRET = {"key", "secret", "token", "password", "account_key", "sas_token", "connection_string"}


@dataclass(frozen=True)
class Target:
    """Where a store lies and how it is reached."""

    url: str  # without options
    protocol: str
    bucket: str
    prefix: str  # empty, or with a slash at its end
    retry_seconds: float
    timeout: float
    options: Mapping[str, Any] = field(repr=False)  # may hold secrets

    def connect(self) -> Client:
        """Return a client; nothing is asked of the store yet.

        Raises ``MissingExtraError``; ``BackendError`` or ``StorageIOError`` where an option makes no sense.
        """
        if self.protocol not in _S3:
            return FsspecClient(self.url, dict(self.options), self.timeout)
        options = dict(self.options)
        region, wanted = options.pop("region", None), options.pop("client", None)
        # What is given to botocore alone cannot be given to obstore.
        plain = not options.keys() & {"client_kwargs", "config_kwargs", "requester_pays", "s3_additional_kwargs"}
        if region:
            options["client_kwargs"] = {"region_name": region, **options.get("client_kwargs", {})}
        try:
            from actcache.segments.places.objects import s3
        except ImportError as error:
            raise protocols.missing(self.url, "s3", error) from error
        make = s3.S3Client
        if wanted == "obstore" or (wanted is None and plain):
            try:
                from actcache.segments.places.objects import obstore_reads

                make = obstore_reads.FastClient if obstore_reads.usable() else make
            except ImportError as error:
                if wanted:
                    raise MissingExtraError(f"client='obstore' needs it ({error}): pip install obstore") from error
        return make(self.bucket, self.prefix, options, self.timeout)


def target(url: str, options: Mapping[str, Any]) -> Target:
    """Return where a store lies. Options stand in the URL's query or are keywords, which come first.

    Raises ``BackendError`` where the URL has no bucket, or an option is not known.
    """
    protocol, _, rest = url.partition("://")
    protocol = protocol.lower()
    rest, _, query = rest.partition("?")
    rest = rest.strip("/")
    bucket, _, prefix = rest.partition("/")
    place = f"{protocol}://{rest}"
    if wrong := _wrong(protocol, bucket, prefix):
        raise BackendError(f"{place!r:.300} names no place: {wrong}")
    given: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in _SECRET - {"key"}:
            raise BackendError(f"{name} does not belong in a URL, which is printed and logged; give {name}=...")
        given[name] = _WORDS.get(value.lower(), value) if name in ("anon", "use_ssl", "cache_regions") else value
    given |= options
    ours = {name: _seconds(name, given.pop(name, default)) for name, default in _OURS.items()}
    if protocol in _S3:
        unknown = sorted(given.keys() - _KNOWN_S3)
        if unknown:
            has = ", ".join(sorted(_KNOWN_S3 | _OURS.keys()))
            hint = "" if unknown[0] in options else "; in a URL options begin at '?', which no prefix can have"
            raise BackendError(f"an {protocol}:// store has no option {unknown[0]!r}; it has {has}{hint}")
        if given.get("client") not in (None, *_CLIENTS):
            raise BackendError(f"client is one of {', '.join(_CLIENTS)}, not {given['client']!r}")
        if "secret" in given and "key" not in given:
            raise BackendError("secret is given without key")
    elif protocol == "memory" and given:
        raise BackendError(f"a memory:// store has no option {sorted(given)[0]!r}; no name can have a '?'")
    return Target(place, protocol, bucket, f"{prefix}/" if prefix else "", **ours, options=given)


def _wrong(protocol: str, bucket: str, prefix: str) -> str:
    """Return why no store can lie at a bucket and prefix, and what to do about it; empty where one can."""
    parts = prefix.split("/") if prefix else []
    if not bucket:
        return f"there is no bucket in it; write {protocol}://bucket/prefix"
    if protocol in _S3 and not _BUCKET.fullmatch(bucket):
        return f"{bucket!r:.80} is no bucket, whose name has letters, digits, '.', '_' and '-'"
    if "" in parts:
        return "two slashes follow each other, with an empty name between them that many tools drop; write one"
    if "." in parts or ".." in parts:
        return "'.' and '..' mean nothing in an object store, and some tools drop them; write what is meant"
    # What clients and servers make of these differs, up to another key than was meant.
    strange = next((c for c in bucket + prefix if unicodedata.category(c) in _STRANGE), None)
    if strange is not None:
        return f"{strange!r} is no character that a name can have; rename the prefix"
    if len(prefix.encode()) > _LONGEST:
        return f"its prefix has {len(prefix.encode())} bytes, and keys below more than {_LONGEST} become too long"
    return ""


def _seconds(name: str, value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds < 86400:
        raise BackendError(f"{name} is a number of seconds, not {value!r:.40}")
    return seconds
