"""A data set of images for a full model, as ``DataLoader`` and the ``Trainer`` see one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import ViTForImageClassification

from actcache.errors import ShapeError
from actcache.models.processing import Features
from actcache.models.training.regimes import FeatureDataset


def stacked(*features: Features) -> dict[str, torch.Tensor]:
    return {features[0].name: torch.from_numpy(np.stack([one.values for one in features]))}


def test_items_and_batches():
    images = [Features("pixel_values", np.full((3, 4, 4), n, np.float32), 5) for n in range(6)]
    documents = FeatureDataset(images, list(range(6)), stacked, ViTForImageClassification)
    assert len(documents) == 6
    item = documents[-1]
    assert (item.position, len(item), [*item]) == (5, 1, ["pixel_values"])
    assert torch.equal(item["pixel_values"], torch.full((3, 4, 4), 5.0))
    assert "labels" not in item
    loader = torch.utils.data.DataLoader(documents, batch_size=4, collate_fn=documents.collate)
    batches = list(loader)
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [batch["pixel_values"][:, 0, 0, 0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]


def test_images_of_two_sizes_in_one_batch():
    images = [Features("pixel_values", np.zeros((3, size, size), np.float32), 5) for size in (4, 8)]
    documents = FeatureDataset(images, None, stacked, ViTForImageClassification)
    assert [*documents.collate([documents[1]])] == ["pixel_values"]
    with pytest.raises(ShapeError, match="2 shapes"):
        documents.collate([documents[0], documents[1]])
