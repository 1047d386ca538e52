"""Train a crosscoder: one set of features for several layers' rows. docs/recipes/train-crosscoder.md"""

import torch
from common import arguments, docstrings

import actcache

given = arguments(__doc__)
texts, _ = docstrings(given.documents)
layers = [1, 3]


class Crosscoder(torch.nn.Module):
    """Features that read all layers together, and are written to each of them."""

    def __init__(self, layers: int, hidden: int, latents: int) -> None:
        super().__init__()
        self.encoder = torch.nn.Parameter(torch.randn(layers, hidden, latents) / hidden**0.5)
        self.decoder = torch.nn.Parameter(self.encoder.detach().permute(2, 0, 1).clone())
        self.threshold = torch.nn.Parameter(torch.zeros(latents))
        self.mean = torch.nn.Parameter(torch.zeros(layers, hidden))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.relu(torch.einsum("nlh,lhf->nf", rows - self.mean, self.encoder) + self.threshold)
        return torch.einsum("nf,flh->nlh", features, self.decoder) + self.mean, features


with actcache.Recyclers.from_pretrained(
    given.model, layers=layers, store=given.store, max_length=128, too_long="truncate"
) as recyclers:
    recyclers.fill(texts, progress=False)
    rows = recyclers.rows(texts, batch_size=256, forever=True, device="cpu")  # [n, layers, hidden], aligned row by row
    first = next(rows).float()
    scale = first.std(dim=(0, 2), keepdim=True)  # layers' rows are of unlike size
    torch.manual_seed(0)
    model = Crosscoder(*first.shape[1:], 2 * first.shape[2])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(100):
        batch = next(rows).float() / scale
        rebuilt, features = model(batch)
        norms = model.decoder.norm(dim=2).sum(1)  # of a feature, in all layers together
        loss = (rebuilt - batch).pow(2).sum((1, 2)).mean() + 0.1 * (features * norms).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    norms = model.decoder.detach().norm(dim=2)
    share = norms[:, 0] / norms.sum(1)
    print(f"loss {loss.item():.1f}, {(features > 0).float().sum(1).mean():.0f} features a row")
    alone = [int((share > 0.7).sum()), int((share < 0.3).sum())]
    for layer, count in zip(layers, alone, strict=True):
        print(f"{count} features write to layer {layer} alone")
    print(f"{len(share) - sum(alone)} features write to both")
    rows.close()
