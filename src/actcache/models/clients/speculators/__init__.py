"""speculators: ``--hidden-states-backend actcache`` of ``speculators train``.

The library looks for backends in a registry, which it fills when a backend is imported. So it is started as

    python -m actcache.models.clients.speculators train --hidden-states-backend actcache --actcache-store ./store ...

(or ``torchrun -m actcache.models.clients.speculators train ...``), which imports this and then is ``speculators``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from hs_connectors import FileTransfer, HiddenStatesBackend, HiddenStatesTransfer

from actcache.errors import CorruptEntryError, UsageError
from actcache.models.clients.draft_samples import DraftSamples, Layer, layers_of
from actcache.store.store import Store, open_standing

logger = logging.getLogger("speculators")

NAME = "actcache"


class StoreTransfer(HiddenStatesTransfer):
    """Hands over samples of a store, found by their tokens; keeps in it what vLLM generates meanwhile.

    It travels to a loader's workers, each of which opens the store for itself. Not thread-safe.

    Args:
        address: the store's URL.
        layers: those of a sample, in its order.
        model: as the store's recipes name it; None where the store has one alone.
        data_path: the data set that the trainer reads, by whose token ids samples are found.
        hidden_states_path: where vLLM leaves generated samples.
    """

    def __init__(
        self, address: str, layers: list[Layer], model: str | None, data_path: str, hidden_states_path: Path
    ) -> None:
        self.address, self.layers, self.model, self.data_path = address, layers, model, data_path
        self._generated = FileTransfer(hidden_states_path)
        self._store: Store | None = None
        self._samples: DraftSamples | None = None
        self._data: Any = None

    def setup(self) -> None:
        """Open the store: what is wrong with the arguments shows here. Does nothing the second time."""
        if self._samples is not None:
            return
        self._store = open_standing(self.address)
        self._samples = DraftSamples.find(self._store, self.layers, model=self.model)
        if not self._samples.prenorm:
            raise UsageError(
                "speculators applies the final norm itself: name the last layer by its number (--actcache-layers), not "
                f"{self.layers[-1]!r}"
            )

    def close(self) -> None:
        """Flush what was generated and close the store; it opens again where it is asked for a sample."""
        store, self._store, self._samples = self._store, None, None
        if store is not None:
            store.close()

    def get_cached(self, file_idx: int) -> dict[str, torch.Tensor] | None:
        """Return the sample of a row of the data set; None where the store lacks it, or holds it damaged."""
        if self._data is None:
            self._data = load_from_disk(self.data_path).with_format("torch", columns=["input_ids"])
        ids = self._data[file_idx]["input_ids"]
        try:
            rows = self._opened().get(ids)
        except CorruptEntryError as error:
            logger.warning("sample %d is not used: %s", file_idx, error)
            return None
        return None if rows is None else {"hidden_states": rows, "token_ids": ids}

    def get_generated(self, hs_transfer_params: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """Return a sample that vLLM has just computed, and put it into the store."""
        sample: dict[str, torch.Tensor] | None = self._generated.get_generated(hs_transfer_params)
        if sample is not None and bool(torch.isfinite(sample["hidden_states"]).all()):  # else the trainer refuses it
            self._opened().put([sample["token_ids"]], [sample["hidden_states"]], overwrite=True)
        return sample

    def delete(self, handle: str) -> None:
        self._generated.delete(handle)

    def _opened(self) -> DraftSamples:
        self.setup()
        assert self._samples is not None
        return self._samples

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_store": None, "_samples": None, "_data": None}


class StoreBackend(HiddenStatesBackend):
    """Samples from a store of actcache."""

    @staticmethod
    def add_train_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--actcache-store", type=str, default=None, help="URL or path of the store.")
        parser.add_argument(
            "--actcache-layers",
            type=str,
            default=None,
            help="Layers of a sample, separated by commas, the last one at the end. (Default: --target-layer-ids and "
            "the verifier's last layer)",
        )
        parser.add_argument(
            "--actcache-model",
            type=str,
            default=None,
            help="The model as the store's spaces name it, where the store has spaces of several.",
        )
        _add_path(parser)

    @staticmethod
    def add_launch_args(parser: argparse.ArgumentParser) -> None:
        _add_path(parser)

    @staticmethod
    def from_train_args(args: argparse.Namespace, data_path: str) -> StoreTransfer:
        """Return the way to the store; ``UsageError`` where the arguments name none, ``StoreError`` where it cannot be
        opened, or has no such spaces."""
        if not args.actcache_store:
            raise UsageError("--hidden-states-backend actcache needs --actcache-store: the store's URL or path")
        layers = layers_of(args.actcache_layers) if args.actcache_layers else _default_layers(args)
        path = Path(args.hidden_states_path) if args.hidden_states_path else Path(data_path) / "hidden_states"
        transfer = StoreTransfer(args.actcache_store, layers, args.actcache_model, data_path, path)
        transfer.setup()  # what is wrong shows here, not in a worker
        transfer.close()
        return transfer

    @staticmethod
    def build_kv_transfer_config(args: argparse.Namespace) -> dict[str, Any]:
        return {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": args.hidden_states_path},
        }


def _add_path(parser: argparse.ArgumentParser) -> None:
    if not any(action.dest == "hidden_states_path" for action in parser._actions):
        parser.add_argument("--hidden-states-path", type=str, default=None, help="Where vLLM leaves hidden states.")


def _default_layers(args: argparse.Namespace) -> list[Layer]:
    from speculators.models.utils import get_verifier_config, resolve_target_layer_ids

    name = args.verifier_name_or_path
    return [*resolve_target_layer_ids(args.target_layer_ids, name), get_verifier_config(name).num_hidden_layers]


if NAME not in HiddenStatesBackend.registry:
    HiddenStatesBackend.register(NAME)(StoreBackend)
