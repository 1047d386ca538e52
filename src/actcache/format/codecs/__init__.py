"""The codecs, each in a file of its kind, behind one interface (``interface.py``)."""
