# %% [markdown]
# # A sparse autoencoder
#
# SAEs read single token rows, mixed across documents, many times over. `recycler.rows` streams them from the
# store, each row once an epoch, in batches of any size.

# %%
import os
import tempfile

import torch

import actcache

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")
STORE = os.environ.get("STORE", tempfile.mkdtemp() + "/activations")
STEPS = int(os.environ.get("STEPS", "300"))

# %%
words = ["river", "engine", "sonata", "glacier", "ledger", "orchard", "quasar", "tailor"]
texts = [f"{a} and {b} in the year {1900 + n}" for n in range(20) for a in words for b in words if a != b]
recycler = actcache.Recycler.from_pretrained(MODEL, layer=4, store=STORE)
report = recycler.fill(texts, progress=False)
print(f"{report.tokens:,} rows of {recycler.recipe.hidden_size}")

# %% [markdown]
# ## The autoencoder
#
# Rows are divided by their mean norm, which is known of a store without a look at its rows. Of each row's
# features the largest 16 are kept.

# %%
torch.manual_seed(0)
hidden, features = recycler.recipe.hidden_size, 4 * recycler.recipe.hidden_size
encode, decode = torch.nn.Linear(hidden, features), torch.nn.Linear(features, hidden)
with torch.no_grad():
    encode.weight.copy_(decode.weight.T)
optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=1e-3)


def reconstruct(rows):
    kept = torch.topk(torch.relu(encode(rows - decode.bias)), 16)
    sparse = torch.zeros(len(rows), features).scatter(1, kept.indices, kept.values)
    return decode(sparse), sparse


step = 0
while step < STEPS:
    for batch in recycler.rows(batch_size=512, seed=step, device="cpu", normalize="mean-norm"):
        rows = batch.float()
        out, sparse = reconstruct(rows)
        loss = ((out - rows) ** 2).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            explained = 1 - loss.item() / rows.var(0).sum().item()
            print(f"step {step}: explained variance {explained:.2f}")
        step += 1
        if step == STEPS:
            break
explained = 1 - loss.item() / rows.var(0).sum().item()
print(f"after {step} steps: explained variance {explained:.2f}, {int((sparse > 0).any(0).sum())} features in use")
recycler.close()
