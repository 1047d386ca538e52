"""Passages in an object store: a fill that is killed is ended by another one, which computes the rest, once each."""

from __future__ import annotations

from tests.models.test_kill_fill import PASSAGE, driver, killed_once, model, pairs, passages  # noqa: F401


def test_a_killed_fill_of_passages_is_ended_by_another(bucket, driver, passages):  # noqa: F811
    killed_once(driver, bucket.url, passages, pairs(), PASSAGE, bucket.options)
