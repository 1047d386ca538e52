"""What a cache takes and gives where many machines fill and read an object store: requests, index, times, prices.

The arithmetic of ``cachectl plan --nodes`` and of docs/scale.md; ``bench/scale.py`` holds it against a simulation and
against what a server was measured to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from actcache.admin.planning import GIB, HOUR, CorpusSize, ModelCosts, nbytes_of
from actcache.errors import UsageError

SEGMENT_BYTES = 256 << 20
PART_BYTES = 16 << 20  # of an upload in parts
INDEX_ENTRY_BYTES = 64
INDEX_SEGMENT_BYTES = 700
SEGMENT_MEMORY = 2400  # bytes of what a process knows of a segment
DOCUMENT_MEMORY = 56  # of what a reader knows of a document, or of a passage where it stands: key, length, order
INDEX_REWRITES = 12  # times that an entry is written into index files, until ten thousand flushes are made
IN_FLIGHT = 32  # requests of a process at a time
FLUSH_REQUESTS = 6  # beside the parts: the marker twice, two to begin and end an upload, the index file, the space
LISTINGS = 3  # of a flush
MONTH = 30.4 * 24 * HOUR


@dataclass(frozen=True)
class ObjectStore:
    """What a store takes and costs; as S3 documents and charges it in its first region, in dollars.

    A prefix is what a store spreads over more machines when it grows hot: S3 by itself, within minutes to an hour.
    """

    gets: float = 5500.0  # a second and prefix
    puts: float = 3500.0
    gib_month: float = 0.023
    get_price: float = 0.4e-6
    put_price: float = 5e-6


@dataclass(frozen=True)
class Nodes:
    """The machines. A device is served by one process.

    Attributes:
        network: bytes a second of a node, up and down.
        request_seconds: until the first byte of an answer, and
        stream: bytes a second of an answer from there on.
        request_cpu: seconds of the processor that a request takes of a reader, and
        byte_cpu: that a byte takes: received, copied, compared with its checksum.
        cores: of a node.
    """

    count: int
    devices: int = 8
    network: float = 12.5e9
    request_seconds: float = 0.03
    stream: float = 90e6
    request_cpu: float = 0.25e-3
    byte_cpu: float = 0.8e-9
    cores: int = 64

    @property
    def processes(self) -> int:
        return self.count * self.devices

    @property
    def uplink(self) -> float:
        """Bytes a second that all of them write."""
        return self.count * self.network


@dataclass(frozen=True)
class FleetEstimate:
    """Times in seconds of all nodes together; what a fill takes, and one shuffled pass."""

    nbytes: int
    segments: int
    index_bytes: int  # of the whole space: each process fetches and maps so many with its first look-up
    process_memory: int  # bytes of a process that reads all of it, beside the mapped index
    open_seconds: float  # until all processes of a node have fetched that
    fill: float
    fill_bound: str
    device_hours: float
    fill_puts: int
    fill_puts_per_second: float
    fill_index_bytes: int  # written in all
    replay: float
    replay_bound: str
    replay_gets: int
    replay_gets_per_second: float
    prefixes: int  # over which a store has to spread a pass's requests
    storage_month: float
    fill_requests: float  # price
    replay_requests: float
    compaction_bytes: int  # read and written once, where all segments are made anew
    compaction: float

    @property
    def verdict(self) -> str:
        """One sentence."""
        spread = "one prefix takes"
        if self.prefixes > 1:
            spread = f"a store has to spread over {self.prefixes} prefixes"
        return (
            f"filling is bound by {self.fill_bound}, a pass by {self.replay_bound}: "
            f"{self.replay_gets_per_second:,.0f} requests a second, which {spread}"
        )


def request_rates(nodes: Nodes, nbytes: float) -> dict[str, float]:
    """Return how many requests of so many bytes a second all processes together can make, by what bounds it."""
    return {
        "requests in flight": nodes.processes * IN_FLIGHT / (nodes.request_seconds + nbytes / nodes.stream),
        "the network": nodes.count * nodes.network / nbytes,
        "the processors": nodes.count * nodes.cores / (nodes.request_cpu + nbytes * nodes.byte_cpu),
    }


def estimate(
    corpus: CorpusSize,
    model: ModelCosts,
    dtype: str,
    nodes: Nodes,
    store: ObjectStore | None = None,
    *,
    bits: float | None = None,
) -> FleetEstimate:
    """Say what filling an object store and reading it back, shuffled, an entry a request, takes of a fleet.

    ``bits``: of a stored number, where they were measured.

    Raises:
        UsageError: a number is not positive.
    """
    store = store or ObjectStore()
    counts = {"documents": corpus.documents, "tokens": corpus.tokens, "nodes": nodes.count, "devices": nodes.devices}
    speeds = {"the model's time": model.full, "the network": nodes.network, "the cores": nodes.cores}
    for name, value in (counts | speeds).items():
        if not value > 0:
            raise UsageError(f"{name} must be positive, not {value}")
    documents = corpus.documents
    nbytes = nbytes_of(corpus, model.hidden_size, dtype, bits)
    segments = max(1, math.ceil(nbytes / SEGMENT_BYTES))
    index = documents * INDEX_ENTRY_BYTES + segments * INDEX_SEGMENT_BYTES

    rewritten = index * INDEX_REWRITES
    seconds = {
        "the lower half": corpus.tokens * model.lower / nodes.processes,
        "the network": (nbytes + rewritten) / nodes.uplink,
    }
    fill, fill_bound = max((value, name) for name, value in seconds.items())
    parts = math.ceil(min(SEGMENT_BYTES, nbytes / segments) / PART_BYTES)
    puts = segments * (parts + FLUSH_REQUESTS + LISTINGS)

    reads = corpus.reads_of_pass
    rates = request_rates(nodes, max(1.0, nbytes * corpus.of_pass / corpus.tokens / reads))
    passes = {name: reads / rate for name, rate in rates.items()}
    passes["the upper half"] = corpus.of_pass * model.upper / nodes.processes
    replay, replay_bound = max((value, name) for name, value in passes.items())
    gets = reads / replay

    return FleetEstimate(
        nbytes=nbytes,
        segments=segments,
        index_bytes=index,
        process_memory=segments * SEGMENT_MEMORY + reads * DOCUMENT_MEMORY,
        open_seconds=index * nodes.devices / nodes.network,
        fill=fill,
        fill_bound=fill_bound,
        device_hours=corpus.tokens * model.lower / HOUR,
        fill_puts=puts,
        fill_puts_per_second=puts / fill,
        fill_index_bytes=rewritten,
        replay=replay,
        replay_bound=replay_bound,
        replay_gets=reads,
        replay_gets_per_second=gets,
        prefixes=max(1, math.ceil(gets / store.gets)),
        storage_month=nbytes / GIB * store.gib_month,
        fill_requests=puts * store.put_price,
        replay_requests=reads * store.get_price,
        compaction_bytes=2 * nbytes,
        compaction=2 * nbytes / (nodes.count * nodes.network),
    )
