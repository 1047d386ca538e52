"""How segments lie on local disks: files, arenas, the index, snapshots.

``files`` publishes, ``segment`` describes one segment, ``index`` finds keys, ``rows`` reads them from ``arena``, and
``snapshot`` joins the three. ``space`` and ``store`` are the drivers that the core builds around any ``SegmentFormat``.
"""
