"""What file systems tell of an object, each in its own words: when it was written, and its MD5."""

from __future__ import annotations

import base64
import hashlib
import time
from datetime import UTC, datetime, timedelta

import pytest

from actcache.segments.places.objects.generic import _age, _md5

AGO = timedelta(hours=2)
WRITTEN = datetime.now(UTC) - AGO


@pytest.mark.parametrize(
    "info",
    [
        {"updated": WRITTEN.isoformat()},
        {"updated": WRITTEN.isoformat().replace("+00:00", "Z")},
        {"last_modified": WRITTEN},
        {"last_modified": WRITTEN.replace(tzinfo=None)},
        {"mtime": WRITTEN.timestamp()},
        {"updated": "some time ago", "last_modified": WRITTEN},
    ],
)
def test_the_age_in_any_words(info):
    ago = datetime.now(UTC) - WRITTEN  # these lines were made when the tests were collected, minutes ago maybe
    assert _age(info) == pytest.approx(ago.total_seconds(), abs=300)


@pytest.mark.parametrize("info", [{}, {"updated": "some time ago"}, {"mtime": time.time() + 3600}])
def test_what_is_not_told_or_lies_ahead_is_new(info):
    assert _age(info) == 0.0


MD5 = hashlib.md5(b"rows").digest()
TEXT = base64.b64encode(MD5).decode()


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({"md5Hash": TEXT}, MD5),
        ({"content_settings": {"content_md5": bytearray(MD5)}}, MD5),
        ({"content_settings": {"content_md5": None}}, None),
        ({"content_settings": None}, None),
        ({"md5Hash": "no base64!"}, None),
        ({}, None),
    ],
)
def test_the_md5_where_it_is_told(info, told):
    assert _md5(info) == told
