"""What tests of the local cache share with the processes that they start."""

from __future__ import annotations

import numpy as np

from actcache.reader.reader import Reader
from tests.support import ids, key, length, rows

COUNT = 60
KEYS = [key(n) for n in range(COUNT)]


class Remote:
    """A space that counts the entries that are read from it, as a remote one would have to send them."""

    def __init__(self, space):
        self.space = space
        self.read = 0

    def __getattr__(self, name):
        return getattr(self.space, name)

    def read_into(self, keys, out, *, token_ids=None):
        self.read += len(keys)
        return self.space.read_into(keys, out, token_ids=token_ids)


def reading(remote, place, keys=KEYS, nbytes="4MiB", **options):
    return Reader(remote, keys, batch_size=7, shuffle=True, local_cache=place, local_bytes=nbytes, **options)


def check(batches, versions=None):
    """Compare batches with the oracle; return the documents in their order."""
    seen = []
    for batch in batches:
        for i, n in enumerate(np.asarray(batch.documents).tolist()):
            version = (versions or {}).get(n, 0)
            part = slice(int(batch.lengths[i]))
            assert int(batch.lengths[i]) == length(n, version)
            np.testing.assert_array_equal(np.asarray(batch.activations)[i, part], rows(n, version))
            np.testing.assert_array_equal(np.asarray(batch.token_ids)[i, part], ids(n, version))
            assert not np.asarray(batch.activations)[i, part.stop :].any()
            seen.append(n)
    return seen
