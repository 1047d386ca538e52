"""Reports on what a store holds, as plain data: the library side of ``cachectl inspect`` and of its page.

``survey`` looks at spaces in full, ``segment_detail`` at one segment, ``document_by_text`` and ``document_by_key`` at
one document, ``overview`` at the store as a tree, ``write_page`` writes a page with plots. All of them read, change
nothing, and do not count as a use of a space.
"""

from __future__ import annotations

from actcache.admin.report.document import DocumentReport, EntryReport, document_by_key, document_by_text
from actcache.admin.report.overview import Branch, Overview, overview
from actcache.admin.report.page import write_page
from actcache.admin.report.sample import SAMPLE, Sample, read_sample
from actcache.admin.report.segments import SegmentDetail, SegmentReport, segment_detail, segments_of
from actcache.admin.report.statistics import Histogram, Lengths, Statistics
from actcache.admin.report.survey import SpaceDetail, Survey, survey

__all__ = [
    "SAMPLE",
    "Branch",
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
    "Survey",
    "document_by_key",
    "document_by_text",
    "overview",
    "read_sample",
    "segment_detail",
    "segments_of",
    "survey",
    "write_page",
]
