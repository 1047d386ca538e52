"""How segments lie on local disks: files, arenas, the index, snapshots.

``files`` publishes, ``segment`` describes one segment, ``index`` finds keys, ``rows`` reads them, ``snapshot`` joins
the three, ``driver`` is the store that the core builds around any ``SegmentFormat``.
"""
