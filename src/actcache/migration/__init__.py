"""Moving a store: every space, entry by entry, between any two backends and places, and the proof that it arrived.

Keys are digests of contents, so what stands in the target already is skipped: a migration that was killed goes on when
it is run again. Checksums bind an entry's rows to the fingerprint of its space, so entries of equal recipes have equal
checksums in every backend. Three things are proved: that what was read is what the source had stored, that the target
says of each entry what the source's rows demand, and that the target's bytes say so when they are read back. The source
is only read.

Entries move a segment at a time, through three stages that overlap: one segment is read and verified, straight into the
memory that is published; the one before is being published; the one before that is being read back.
"""

from actcache.migration.results import Migration, SpaceMigration
from actcache.migration.stores import meetings, migrate

__all__ = ["Migration", "SpaceMigration", "meetings", "migrate"]
