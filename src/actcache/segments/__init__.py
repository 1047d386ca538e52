"""The engine: segments in a place, and the space and store that the core builds of them around any ``SegmentFormat``.

From the bottom up: ``segment`` describes one segment, ``rows`` reads from segments, ``places`` hold them, ``index``
finds keys in them, ``tombstones`` say what is deleted, ``snapshot`` joins these at one moment, ``catalog`` lists and
publishes, ``compaction`` and ``quarantine`` work on a catalog, ``space_driver`` and ``store_driver`` implement the
plug-in contracts, and ``registry`` finds the backend of a URL.
"""
