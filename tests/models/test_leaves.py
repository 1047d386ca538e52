"""What values beside tensors come down to in a lower half's digest: nothing is passed over in silence."""

from __future__ import annotations

import dataclasses
import enum
import io

import numpy as np
import pytest
import torch

from actcache.errors import ModelError
from actcache.models.weights import leaves


class Mode(enum.Enum):
    FAST = 1


@dataclasses.dataclass
class Settings:
    scale: float
    mode: Mode


def taken(value: object) -> list[tuple[str, object]]:
    return [
        (name, leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf) for name, leaf in leaves("layer.state", value)
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, [("layer.state", "0x1.0000000000000p-1")]),
        (float("nan"), [("layer.state", "nan")]),
        (torch.float16, [("layer.state", "torch.float16")]),
        (torch.device("cpu"), []),
        (b"ab", [("layer.state", [97, 98])]),
        (b"", [("layer.state", [])]),
        (io.BytesIO(b"a"), [("layer.state", [97])]),
        (np.array([1, 2]), [("layer.state", [1, 2])]),
        (np.float32(0.5), [("layer.state", 0.5)]),
        (Mode.FAST, [("layer.state", "Mode.FAST")]),
        ([True, None], [("layer.state", 2), ("layer.state.0", True), ("layer.state.1", None)]),
        ({"a": "b"}, [("layer.state", 1), ("layer.state.a", "b")]),
        (
            Settings(2.0, Mode.FAST),
            [
                ("layer.state", "Settings"),
                ("layer.state.scale", "0x1.0000000000000p+1"),
                ("layer.state.mode", "Mode.FAST"),
            ],
        ),
    ],
    ids=[
        "float",
        "NaN",
        "dtype",
        "device",
        "bytes",
        "no bytes",
        "stream",
        "array",
        "scalar",
        "enum",
        "list",
        "dict",
        "data",
    ],
)
def test_it_comes_down_to(value, expected):
    assert taken(value) == expected


@pytest.mark.parametrize(
    "value",
    [object(), np.array(["text"]), lambda: 1, torch.empty(2, device="meta")],
    ids=["object", "texts", "function", "no memory"],
)
def test_what_cannot_be_told_is_refused_by_its_name(value):
    with pytest.raises(ModelError, match=r"layer\.state"):
        taken(value)
