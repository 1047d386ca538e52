"""Probe every layer: where does a model know which module a docstring is from? docs/recipes/probe-layers.md"""

import numpy as np
from common import arguments, docstrings
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig

import actcache

given = arguments(__doc__)
texts, labels = docstrings(given.documents)
labels = np.array(labels)
held_out = np.arange(len(texts)) % 5 == 0
layers = range(1, AutoConfig.from_pretrained(given.model).num_hidden_layers)

with actcache.Recyclers.from_pretrained(
    given.model, layers=layers, store=given.store, max_length=128, too_long="truncate"
) as recyclers:
    recyclers.fill(texts, progress=False)  # one pass through the model for all layers
    for layer, recycler in recyclers.items():
        means = recycler.pooled(texts)  # [documents, hidden], the mean over each one's tokens
        means = StandardScaler().fit(means[~held_out]).transform(means)
        probe = LogisticRegression(C=0.05, max_iter=200).fit(means[~held_out], labels[~held_out])
        print(f"layer {layer}: accuracy {probe.score(means[held_out], labels[held_out]):.2f}")
