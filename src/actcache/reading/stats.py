"""What a reader tells about itself: where the time went."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ReaderStats:
    """Counts since the reader was made, over all epochs. Times in seconds."""

    batches: int = 0
    documents: int = 0
    tokens: int = 0
    nbytes: int = 0  # of activations, as they are stored, without padding
    read_seconds: float = 0.0  # in the thread that reads ahead: look-up, rows, checksums
    deliver_seconds: float = 0.0  # from host buffer to the tensors of the batch
    compute_seconds: float = 0.0  # the lower half, for documents that were missing
    wait_seconds: float = 0.0  # the consumer waited for a batch
    first_seconds: float = 0.0  # of which for the first batch of an epoch, when there is nothing to hide behind
    step_seconds: float = 0.0  # the consumer worked between two batches
    ready: int = 0  # batches that stood ready when the consumer asked, summed over its requests

    @property
    def read_gb_per_second(self) -> float:
        """GB (10**9 bytes) of activations a second of reading."""
        return self.nbytes / self.read_seconds / 1e9 if self.read_seconds else 0.0

    @property
    def stall_fraction(self) -> float:
        """The share of the consumer's time that it waited, first batches of epochs aside."""
        waited = max(0.0, self.wait_seconds - self.first_seconds)
        total = waited + self.step_seconds
        return waited / total if total else 0.0

    @property
    def queue_depth(self) -> float:
        """Batches that stood ready when the consumer asked for one, on average."""
        return self.ready / self.batches if self.batches else 0.0

    def verdict(self) -> str:
        """Return in one line what the consumer's time went to."""
        if not self.batches:
            return "nothing was read yet"
        stalled = self.stall_fraction
        if self.compute_seconds > max(self.read_seconds, self.step_seconds):
            return f"filling: the lower half took {self.compute_seconds:.1f} s for documents that were not stored yet"
        if stalled <= 0.02:
            return f"compute-bound: loading hid behind {1 - stalled:.1%} of the steps"
        return (
            f"loading-bound: the consumer waited {stalled:.1%} of its time; reading gives "
            f"{self.read_gb_per_second:.2f} GB/s"
        )
