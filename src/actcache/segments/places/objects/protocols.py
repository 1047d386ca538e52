"""Which schemes of fsspec a store can have, and which packages they need."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.registry import available_protocols

from actcache.errors import BackendError, MissingExtraError

#: Schemes whose packages an extra of ours brings.
_EXTRAS = {
    **dict.fromkeys(("gs", "gcs"), ("gs", "gcsfs")),
    **dict.fromkeys(("az", "abfs", "abfss"), ("az", "adlfs")),
    **dict.fromkeys(("s3", "s3a"), ("s3", "s3fs")),
}
_PACKAGES = {
    "box": "boxfs",
    "dropbox": "dropboxdrivefs",
    "gdrive": "gdrive_fsspec",
    "hdfs": "pyarrow",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "lakefs": "lakefs-spec",
    "oci": "ocifs",
    "ocilake": "ocifs",
    "oss": "ossfs",
    "root": "fsspec-xrootd",
    "sftp": "paramiko",
    "smb": "smbprotocol",
    "ssh": "paramiko",
    "tos": "tosfs",
    "tosfs": "tosfs",
    "wandb": "wandbfs",
    "webdav": "webdav4[fsspec]",
    "webhdfs": "requests",
}
#: Their files appear under their names before they are whole: what is written there could be read half.
FOLDERS = frozenset({"arrow_hdfs", "dbfs", "ftp", "hdfs", "root", "sftp", "smb", "ssh", "webdav", "webhdfs"})
_AROUND = {"async_wrapper", "asyncwrapper", "blockcache", "cached", "dir", "filecache", "generic", "simplecache"}
_OTHERS = {"asynclocal", "data", "gist", "git", "github", "http", "https", "libarchive", "pyscript", "reference"}
#: What stands around another file system, or holds no files that somebody could put there.
_NO_PLACES = _AROUND | _OTHERS | {"tar", "zip"}


def is_known(protocol: str) -> bool:
    """Return whether fsspec knows a scheme, and a store can lie there."""
    return protocol in available_protocols() and protocol not in _NO_PLACES


def file_system(url: str, protocol: str) -> Any:
    """Return the class of the file system that serves a URL.

    Raises:
        MissingExtraError: a package is missing; it says which.
        BackendError: nobody knows the scheme.
    """
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise missing(url, protocol, error) from error
    except ValueError as error:
        raise BackendError(f"cannot open {url}: {error}") from error


def missing(url: str, protocol: str, error: Exception) -> MissingExtraError:
    """Return the exception that says what to install."""
    if protocol in _EXTRAS:
        extra, package = _EXTRAS[protocol]
        return MissingExtraError(f"{url} needs {package} ({error}): pip install 'actcache[{extra}]'")
    if protocol in _PACKAGES:
        return MissingExtraError(f"{url} needs another package ({error}): pip install '{_PACKAGES[protocol]}'")
    return MissingExtraError(f"{url} needs another package: {error}")
