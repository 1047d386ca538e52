"""Fine-tune the upper layers: which module is a docstring from? docs/recipes/fine-tune.md"""

import numpy as np
import torch
from common import arguments, docstrings
from transformers import AutoModelForSequenceClassification

import actcache

given = arguments(__doc__)
texts, labels = docstrings(given.documents)
labels = np.array(labels)
held_out = np.arange(len(texts)) % 5 == 0
torch.manual_seed(0)
task = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=int(labels.max()) + 1)
half = task.config.num_hidden_layers // 2

with actcache.Recycler.from_pretrained(
    given.model, layer=half, store=given.store, max_length=128, too_long="truncate"
) as recycler:
    print(recycler.fill(texts, progress=False))  # once; the next run finds everything there
    reduced = recycler.reduce(task).train()  # layers half + 1 and up, and the head
    optimizer = torch.optim.AdamW([p for p in reduced.parameters() if p.requires_grad], 3e-4)
    some = [text for text, out in zip(texts, held_out, strict=True) if not out]
    reader = recycler.reader(some, labels=labels[~held_out], batch_size=16, shuffle=True, bucket=True)
    for epoch in range(2):
        losses = []
        for batch in reader:
            loss = reduced(**batch.model_inputs()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}")
    others = [text for text, out in zip(texts, held_out, strict=True) if out]
    right = 0
    with torch.no_grad():
        for batch in recycler.reader(others, labels=labels[held_out], batch_size=32):
            right += int((reduced.eval()(**batch.model_inputs()).logits.argmax(-1) == batch.labels).sum())
    print(f"accuracy {right / len(others):.2f} on {len(others)} held-out docstrings")
    full = reduced.merge_into(task)  # an ordinary model of transformers again
    print(f"merged into a {type(full).__name__}")
