"""What a migration says that it did, and the proof."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpaceMigration:
    """What became of one space.

    The digests are BLAKE2b-128 over key, tokens and checksums of all entries of the source, sorted by key: what the
    target should hold, by the source's rows, and what it does hold, by its own checksums, which its bytes were read
    and compared with.
    """

    source: str  # fingerprint
    target: str  # the same, unless the dtype changed
    stored_as: str  # how the target stores rows, see ``Recipe.stored_as``
    via: list[str]  # dtypes that show in the target's rows, so that no recycler for the target's dtype finds them
    entries: int  # of the source
    copied: int  # the others stood in the target
    nbytes: int  # of the rows that were read from the source
    digest: str
    target_digest: str
    corrupt: list[bytes] = field(default_factory=list)  # keys that fail their checksums in the source: not copied
    differing: list[bytes] = field(default_factory=list)  # keys of which the target holds other numbers, or none
    damaged: dict[str, str] = field(default_factory=dict)  # segments of the source that cannot be read

    @property
    def equal(self) -> bool:
        """Whether the target is proved to hold all that the source holds."""
        return self.digest == self.target_digest and not self.damaged and not self.differing


@dataclass(frozen=True)
class Migration:
    """What ``migrate`` did."""

    spaces: list[SpaceMigration]
    unreadable: dict[str, str]  # fingerprints of the source's spaces that were left out, and why
    collections: dict[str, str]  # name -> "copied", "present", or what is wrong

    @property
    def equal(self) -> bool:
        """Whether the target is proved to hold all that was to be migrated."""
        fine = all(state in ("copied", "present") for state in self.collections.values())
        return fine and not self.unreadable and all(space.equal for space in self.spaces)
