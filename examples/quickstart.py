# %% [markdown]
# # A first cache
#
# The lower layers of a transformer give the same numbers whenever a text comes by. Here they are computed once
# and stored, and a classifier is trained from what is stored.

# %%
import os
import tempfile
import time

import torch
from transformers import AutoModelForSequenceClassification

import actcache

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")
STORE = os.environ.get("STORE", tempfile.mkdtemp() + "/activations")

# %% [markdown]
# ## Some text
#
# Two kinds of sentence, told apart by their words: enough to see a loss go down.

# %%
subjects = ["the film", "this book", "her song", "that play", "his speech", "the meal", "our trip", "the match"]
good, bad = ["fine", "moving", "clever", "bright"], ["dull", "clumsy", "noisy", "bleak"]
words = good + bad
texts = [
    f"{subject} was {word}, said friend number {n}" for n in range(4) for subject in subjects for word in good + bad
]
labels = [int(word in good) for n in range(4) for subject in subjects for word in words]
print(len(texts), "texts, such as", repr(texts[0]))

# %% [markdown]
# ## Fill
#
# Layers 1 to 3 run once for each text. A second fill finds all there.

# %%
recycler = actcache.Recycler.from_pretrained(MODEL, layer=3, store=STORE)
first = recycler.fill(texts, progress=False)
again = recycler.fill(texts, progress=False)
print(f"first: {first.computed} computed; again: {again.computed} computed, {again.present} were there")

# %% [markdown]
# What is stored of one text: a row for each token, and the token ids.

# %%
(entry,) = recycler.space.get([actcache.document_key(texts[0])])
print(entry.activations.shape, entry.activations.dtype, entry.token_ids[:6])

# %% [markdown]
# ## Train the rest
#
# `reduce` takes the lower half out of the task model. What is left reads stored rows; outputs and losses are
# the full model's.

# %%
torch.manual_seed(0)
task = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
model = recycler.reduce(task)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(3):
    began = time.perf_counter()
    for batch in recycler.reader(texts, labels=labels, batch_size=32, shuffle=True, seed=epoch, device="cpu"):
        loss = model(**batch.model_inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert time.perf_counter() > began
    print(f"epoch {epoch}: loss of the last batch {loss.item():.2f}")

# %% [markdown]
# The trained model works from stored rows; to use it on new text, fill that text first.

# %%
model.eval()
asked = ["the song was bright", "the meal was bleak"]
recycler.fill(asked, progress=False)
(batch,) = recycler.reader(asked, batch_size=2, device="cpu")
with torch.inference_mode():
    print(dict(zip(asked, model(**batch.model_inputs()).logits.argmax(1).tolist(), strict=True)))
recycler.close()
