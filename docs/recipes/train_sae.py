"""Train a sparse autoencoder on rows that are mixed across documents. docs/recipes/train-sae.md"""

import torch
from common import arguments, docstrings

import actcache

given = arguments(__doc__)
texts, _ = docstrings(given.documents)


class TopK(torch.nn.Module):
    """``k`` of ``latents`` features explain a row."""

    def __init__(self, hidden: int, latents: int, k: int, mean: torch.Tensor) -> None:
        super().__init__()
        self.k, self.mean = k, torch.nn.Parameter(mean)
        directions = torch.nn.functional.normalize(torch.randn(latents, hidden), dim=1)
        self.decoder = torch.nn.Parameter(directions)
        self.encoder = torch.nn.Parameter(directions.t().clone())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found = torch.topk(torch.relu((rows - self.mean) @ self.encoder), self.k, dim=-1)
        sparse = torch.zeros(len(rows), len(self.decoder)).scatter(1, found.indices, found.values)
        return sparse @ self.decoder + self.mean


with actcache.Recycler.from_pretrained(
    given.model, layer=2, store=given.store, max_length=128, too_long="truncate"
) as recycler:
    recycler.fill(texts, progress=False)
    special = recycler.agreement.encoder.tokenizer.all_special_ids
    rows = recycler.rows(texts, batch_size=256, exclude={"token_ids": special}, forever=True, device="cpu")
    print(f"a batch has rows of {rows.documents_mixed:.0f} documents")
    torch.manual_seed(0)
    first = next(rows).float()
    sae = TopK(first.shape[1], 2 * first.shape[1], 16, first.mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), 1e-3)
    for step in range(100):
        batch = next(rows).float()
        error = (sae(batch) - batch).pow(2).sum(1).mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            explained = 1 - error.item() / (batch - batch.mean(0)).pow(2).sum(1).mean().item()
            print(f"step {step + 1}: explained variance {explained:.2f}")
    rows.close()
