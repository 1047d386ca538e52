"""Fuzz targets: one a parser of what a stranger may have written.

    pip install atheris
    python -m tests.fuzz hdf5 --seconds 600

The everyday test mutates the seeds without atheris, for a second each.
"""
