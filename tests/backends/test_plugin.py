"""A third party's backend: a distribution of its own, installed by pip, passes the conformance suite."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile

import pytest

from tests.support import MEMORY_FOLDER, PYTHONPATH

pytestmark = pytest.mark.processes

#: Each array of a segment is a file of its own, in a folder with a JSON table; of actcache it needs one module.
MODULE = '''
"""Segments that are folders of raw arrays."""

import json

from actcache.backend import Extent, Layout, SegmentFormat
from actcache.errors import FormatError
from actcache.format.ragged import pieces


class RawFormat(SegmentFormat):
    name = "rawfiles"
    suffix = ".raw"
    commit = "table.json"

    def write(self, path, block, metadata):
        path.mkdir()
        table = {}
        for name, array in block.arrays().items():
            with open(path / f"{name}.bin", "xb") as file:
                for piece in pieces(array):
                    file.write(piece)
            table[name] = [array.dtype.str, list(array.shape)]
        (path / "table.json").write_text(json.dumps([table, dict(metadata)]))

    def layout(self, files):
        try:
            table, metadata = json.loads(files.read("table.json", 0, 1 << 16))
            extents = {n: Extent(f"{n}.bin", 0, dtype, tuple(shape)) for n, (dtype, shape) in table.items()}
            return Layout(extents, dict(metadata))
        except (ValueError, TypeError, AttributeError) as error:
            raise FormatError(f"{files.where} is damaged: {error}") from None


backend = RawFormat()
'''

#: What the author of a backend writes to have it tested.
SUITE = """
import os

import pytest
import actcache
from actcache.testing.conformance import BackendConformance


class TestRawFiles(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path):
        return f"rawfiles:{tmp_path}/store"


if os.environ["READING"]:

    class TestRawFilesByReading(TestRawFiles):
        options = {"mapped": False}


def test_it_is_found_by_name():
    assert "rawfiles" in actcache.segments.registry.backends()
"""


def wheel(folder):
    """Write the wheel that a build of such a project makes."""
    info = "actcache_rawfiles-1.0.dist-info"
    files = {
        "actcache_rawfiles.py": MODULE,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: actcache-rawfiles\nVersion: 1.0\nRequires-Dist: actcache\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[actcache.backends]\nrawfiles = actcache_rawfiles:backend\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for name, text in files.items()
    }
    record = [f"{name},sha256={digests[name]},{len(text.encode())}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = folder / "actcache_rawfiles-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.mark.timeout(280)
@pytest.mark.parametrize("reading", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_third_partys_distribution_passes_the_conformance_suite(reading, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    done = subprocess.run([*pip, str(wheel(tmp_path))], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        pytest.skip("there is no pip")
    assert done.returncode == 0, done.stderr
    (tmp_path / "test_rawfiles.py").write_text(SUITE)
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{PYTHONPATH}", "TMPDIR": str(tmp_path)}
    environment["READING"] = "yes" if reading else ""
    place = tempfile.mkdtemp(dir=MEMORY_FOLDER)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "--basetemp",
        f"{place}/pytest",
        "-W",
        "error",
    ]
    suite = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_rawfiles.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    shutil.rmtree(place)
    assert suite.returncode == 0, suite.stdout[-8000:] + suite.stderr
    last = suite.stdout.strip().splitlines()[-1]
    assert int(last.split()[0]) > (50 if reading else 25), last
    assert "skipped" not in last
