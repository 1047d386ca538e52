# %% [markdown]
# # Probe every layer
#
# Where in a model is it known which module of Python a docstring is from? One pass stores all layers; a probe
# on each takes seconds.
# It draws with matplotlib, which `pip install 'actcache[models,plots]'` brings.

# %%
import ast
import os
import sysconfig
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import actcache

MODEL = os.environ.get("MODEL", "sentence-transformers/all-MiniLM-L6-v2")
STORE = os.environ.get("STORE", tempfile.mkdtemp() + "/activations")
EACH = int(os.environ.get("EACH", "60"))  # docstrings of a module

# %% [markdown]
# ## A corpus that is on every machine
#
# Docstrings of the standard library, labelled with where they come from.

# %%
texts, labels = [], []
modules = ["asyncio", "email", "unittest", "tkinter"]
for label, module in enumerate(modules):
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib"), module).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                found.append(ast.get_docstring(node))
    found = sorted(set(found))[:EACH]
    texts, labels = texts + found, labels + [label] * len(found)
labels = torch.tensor(labels)
print(len(texts), "docstrings of", ", ".join(modules))

# %% [markdown]
# ## One pass for all layers
#
# `too_long="truncate"` cuts what is longer than 128 tokens; without it, a fill stops at such a document and
# says so.

# %%
recyclers = actcache.Recyclers.from_pretrained(MODEL, layers="all", store=STORE, max_length=128, too_long="truncate")
report = recyclers.fill(texts, progress=False)
print(f"{report.computed} texts at {len(recyclers)} layers")

# %% [markdown]
# ## A probe on each
#
# `pooled` is the mean over each document's tokens, `[documents, layers, hidden]`, streamed from the store. The
# probe is a linear layer, trained on four fifths of the documents.

# %%
means = torch.from_numpy(recyclers.pooled(texts))
held_out = torch.arange(len(texts)) % 5 == 0
accuracies = []
for number in range(means.shape[1]):
    rows = means[:, number]
    rows = (rows - rows[~held_out].mean(0)) / (rows[~held_out].std(0) + 1e-6)
    torch.manual_seed(0)
    probe = torch.nn.Linear(rows.shape[1], len(modules))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(probe(rows[~held_out]), labels[~held_out])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracies.append((probe(rows[held_out]).argmax(1) == labels[held_out]).float().mean().item())
print([round(one, 2) for one in accuracies])

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(list(recyclers), accuracies, "o-")
axes.axhline(np.bincount(labels).max() / len(labels), linestyle="--", color="gray", label="always the largest class")
axes.set(xlabel="layer", ylabel="accuracy of the probe", ylim=(0, 1))
axes.legend()
recyclers.close()
