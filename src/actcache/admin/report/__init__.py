"""Reports on what a store holds, as plain data: the library side of ``cachectl inspect`` and of its page.

``store_detail`` looks at spaces in full, ``segment_detail`` at one segment, ``document_by_text`` and
``document_by_key`` at one document, ``overview`` at the store as a tree, ``write_page`` writes a page with plots. All
of them read, change nothing, and do not count as a use of a space.
"""

from __future__ import annotations

from actcache.admin.report.document import DocumentReport, EntryReport, document_by_key, document_by_text
from actcache.admin.report.page import write_page
from actcache.admin.report.spaces import (
    SAMPLE,
    Overview,
    Sample,
    SegmentDetail,
    SegmentReport,
    SpaceDetail,
    StoreDetail,
    coverage_as_json,
    overview,
    segment_detail,
    store_detail,
)
from actcache.admin.report.statistics import Histogram, Lengths, Statistics

__all__ = [
    "SAMPLE",
    "DocumentReport",
    "EntryReport",
    "Histogram",
    "Lengths",
    "Overview",
    "Sample",
    "SegmentDetail",
    "SegmentReport",
    "SpaceDetail",
    "Statistics",
    "StoreDetail",
    "coverage_as_json",
    "document_by_key",
    "document_by_text",
    "overview",
    "segment_detail",
    "store_detail",
    "write_page",
]
