"""sentence-transformers: an input module that starts from stored rows, in that library's own models and trainer.

``recycler.reduce`` makes it of a ``SentenceTransformer`` or of its ``Transformer`` module; what comes after it
(pooling, normalization, ...) is that library's own.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule, Transformer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from actcache.errors import ActcacheError, LowerHalfMismatchError, ModelError, UnsupportedModelError, UsageError
from actcache.format.arguments import check_choice
from actcache.format.keys import document_key
from actcache.format.recipe import Recipe
from actcache.models.loading import load_reduced
from actcache.models.tokenizing import DocumentEncoder, tokenizer_digest
from actcache.store.space import Space
from actcache.store.store import open_store

DESCRIPTION_NAME = "actcache.json"
VERSION = 1

_OWN = "sentence_transformers."


class Source:
    """Where a module's rows come from. Copies of a model share it; what travels to other processes is the space.

    Args:
        address: the store's URL, made absolute.
        supply: computes and puts the texts that are missing; None where nothing can.
    """

    def __init__(self, space: Space, address: str, supply: Callable[[Sequence[str]], object] | None) -> None:
        self.space, self.address, self.supply = space, address, supply
        self._pid = os.getpid()

    def batch(self, texts: Sequence[str], *, compute: bool) -> Any:
        """Return the texts' entries as one padded batch of CPU tensors.

        Absent ones are computed where that is asked for and can be, or named by a ``MissingEntryError``.
        """
        keys = [document_key(text) for text in texts]
        if compute and self.supply is not None and not (found := self.space.contains(keys)).all():
            if os.getpid() != self._pid:
                raise UsageError(
                    "texts are computed in one process only: train with dataloader_num_workers=0, or fill them first "
                    "(recycler.fill)"
                )
            self.supply([text for text, there in zip(texts, found, strict=True) if not there])
        return next(iter(self.space.reader(keys, batch_size=len(keys), depth=0, device="cpu")))

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self.space, self.address, None)


class StoredTransformer(InputModule):
    """A ``Transformer`` module without its lower half: it looks texts up instead of computing them so far.

    Texts are found by their characters, a prompt before them included. ``preprocess`` reads their rows, ``forward``
    runs the upper layers. Texts are cut where they were cut when they were recorded.

    Attributes:
        model: the reduced model.
        on_missing: ``"compute"`` computes and stores texts that are absent, ``"raise"`` raises ``MissingEntryError``.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, source: Source, max_seq_length: int | None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self._max_seq_length = max_seq_length
        self.on_missing = "raise" if source.supply is None else "compute"

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text, special tokens included, at most: what was recorded."""
        return self._max_seq_length

    @property
    def auto_model(self) -> Any:
        """The reduced model, by the name that this library's modules have for it."""
        return self.model

    @property
    def config(self) -> Any:
        return self.model.config

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, max_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the rows of texts: ``activations`` [B, L, hidden], ``input_ids`` and ``attention_mask`` [B, L].

        Raises:
            UsageError: an input is no text, or ``max_length`` another than was recorded.
            MissingEntryError, CorruptEntryError: a text's entry is absent, or fails its checksum.
        """
        check_choice("on_missing", self.on_missing, ("compute", "raise"))
        wrong = next((one for one in inputs if not isinstance(one, str)), None)
        if wrong is not None:
            raise UsageError(f"a model of stored activations takes texts, not a {type(wrong).__name__}")
        if max_length not in (None, self._max_seq_length):
            raise UsageError(
                f"texts were recorded with at most {self._max_seq_length} tokens, not {max_length}: leave it out"
            )
        texts = [prompt + text for text in inputs] if prompt else list(inputs)
        batch = self.source.batch(texts, compute=self.on_missing == "compute")
        features = {
            "activations": batch.activations,
            "input_ids": batch.token_ids,
            "attention_mask": batch.attention_mask,
            "modality": "text",
        }
        if prompt:
            ids = self.tokenizer(prompt)["input_ids"]
            features["prompt_length"] = len(ids) - (ids[-1] in self.tokenizer.all_special_ids)
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the upper layers on what ``preprocess`` returned; add ``token_embeddings`` [B, L, hidden]."""
        output = self.model(
            activations=features["activations"],
            token_ids=features["input_ids"],
            attention_mask=features["attention_mask"],
            return_dict=True,
        )
        features["token_embeddings"] = output.last_hidden_state
        return features

    def get_embedding_dimension(self) -> int:
        return int(self.model.config.hidden_size)

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Save the reduced model, the tokenizer, and which space of which store it belongs to."""
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)
        source = self.source
        about = {"version": VERSION, "store": source.address, "recipe": source.space.recipe.to_json()}
        about["max_seq_length"] = self._max_seq_length
        Path(output_path, DESCRIPTION_NAME).write_text(json.dumps(about, indent=2), encoding="utf-8")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        model_kwargs: dict[str, Any] | None = None,
        source: Source | None = None,
        **options: Any,
    ) -> StoredTransformer:
        """Load what ``save`` wrote.

        Args:
            model_kwargs: ``{"store": url}`` where the store lies elsewhere now.
            source: of a recycler; None opens the store read-only, from which no absent text is computed.

        Raises:
            ModelError: the folder holds no such module.
            StoreError: the store cannot be opened, or has no such space.
        """
        folder = Path(model_name_or_path, subfolder)
        try:
            about = json.loads((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
            version, address = int(about["version"]), str(about["store"])
            recipe, longest = Recipe.from_json(about["recipe"]), about["max_seq_length"]
        except (OSError, ValueError, KeyError, TypeError, ActcacheError) as error:
            raise ModelError(f"{folder} holds no model of stored activations ({DESCRIPTION_NAME}: {error})") from None
        if version > VERSION:
            raise ModelError(f"{folder} was written by a newer release (version {version}): update actcache")
        if source is None:
            address = str((model_kwargs or {}).get("store", address))
            source = Source(open_store(address, "r").space(recipe), address, None)
        model = load_reduced(folder, source.space.recipe)
        return cls(model, AutoTokenizer.from_pretrained(folder), source, longest)


def reduce(full: Any, encoder: DocumentEncoder, source: Source, reduce_model: Callable[[Any], Any]) -> Any:
    """Return a ``SentenceTransformer``, or its ``Transformer`` module, that starts from stored rows; see
    ``Recycler.reduce``. The modules after the first are copies; ``full`` is untouched."""
    module = full[0] if isinstance(full, SentenceTransformer) else full
    if isinstance(module, StoredTransformer):
        raise ModelError("the model starts from stored activations already; reduce the full one")
    if not isinstance(module, Transformer):
        raise UnsupportedModelError(f"the first module is a {type(module).__name__}: only a Transformer is reduced")
    text = module.modality_config.get("text", {})
    if text.get("method") != "forward" or module.module_output_name != "token_embeddings":
        raise UnsupportedModelError("only a Transformer module that makes token embeddings of texts is reduced")
    _check_same_tokens(module, encoder, source.space.recipe)
    stored = StoredTransformer(reduce_model(module.model), module.tokenizer, source, module.max_seq_length)
    stored.train(module.training)
    if not isinstance(full, SentenceTransformer):
        return stored
    return _assembled(stored, [copy.deepcopy(one) for one in list(full)[1:]], full, str(full.device))


def _check_same_tokens(module: Any, encoder: DocumentEncoder, recipe: Recipe) -> None:
    if encoder.windows is not None or encoder.passages is not None:
        raise UsageError("a text has one embedding: record with too_long='truncate', not with windows or passages")
    if tokenizer_digest(module.tokenizer) != recipe.tokenizer:
        raise LowerHalfMismatchError(
            "the model's tokenizer makes other tokens than the recorded one: make the recycler of model[0].model and "
            "model.tokenizer"
        )
    longest = module.max_seq_length
    if longest is not None and (encoder.too_long != "truncate" or encoder.max_length != longest):
        raise LowerHalfMismatchError(
            f"the model cuts texts after {longest} tokens, and the recycler does not: make it with "
            f"max_length={longest}, too_long='truncate'"
        )


def _assembled(stored: StoredTransformer, others: Sequence[Any], like: Any, device: str) -> SentenceTransformer:
    return SentenceTransformer(
        modules=[stored, *others],
        device=device,
        prompts=dict(like.prompts or {}),
        default_prompt_name=like.default_prompt_name,
        similarity_fn_name=like.similarity_fn_name,
        truncate_dim=like.truncate_dim,
    )


def load(folder: str | os.PathLike[str], source: Source) -> SentenceTransformer:
    """Load a saved model of stored activations; see ``Recycler.load_reduced``. Nothing of the folder is executed.

    Raises:
        ModelError: it is none, or has a module that is not this library's own.
        LowerHalfMismatchError: it belongs to another lower half.
    """
    path = Path(folder)
    try:
        listed = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        config = json.loads((path / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        kinds = [(str(one["type"]), str(one["path"])) for one in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} holds no saved SentenceTransformer: {error}") from None
    own = f"{StoredTransformer.__module__}.{StoredTransformer.__qualname__}"
    foreign = [kind for kind, _ in kinds[1:] if not kind.startswith(_OWN)]
    if not kinds or kinds[0][0] != own or foreign:
        named = foreign[0] if foreign else kinds[0][0] if kinds else "none"
        raise ModelError(f"{path} is no model of stored activations: it has a module {named}")
    stored = StoredTransformer.load(str(path), kinds[0][1], source=source)
    others = [_class_named(kind, path).load(str(path / sub)) for kind, sub in kinds[1:]]
    model = SentenceTransformer(
        modules=[stored, *others],
        device="cpu",
        prompts=config.get("prompts"),
        default_prompt_name=config.get("default_prompt_name"),
        similarity_fn_name=config.get("similarity_fn_name"),
        truncate_dim=config.get("truncate_dim"),
    )
    return model.eval()


def _class_named(kind: str, path: Path) -> Any:
    module, _, name = kind.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{path} has a module {kind}, which this sentence-transformers does not know") from error
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise ModelError(f"{path} has a module {kind}, which is none")
    return found


def merge(reduced: SentenceTransformer, full: SentenceTransformer) -> SentenceTransformer:
    """Put what a reduced model has learned into a full one, in place, and return that.

    Raises:
        LowerHalfMismatchError: the full model's lower half is another than the recorded one.
        ModelError: the models have other modules, or do not fit. Nothing was changed.
    """
    mine, theirs = list(reduced), list(full)
    kinds = [type(module).__name__ for module in theirs[1:]]
    if not isinstance(mine[0], StoredTransformer) or [type(module).__name__ for module in mine[1:]] != kinds:
        raise ModelError(f"the reduced model does not fit: give a full one with the modules {', '.join(kinds)}")
    for own, other in zip(mine[1:], theirs[1:], strict=True):
        shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (own, other)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"the {type(own).__name__} modules of the two models are of other shapes")
    mine[0].model.merge_into(theirs[0].model)
    for own, other in zip(mine[1:], theirs[1:], strict=True):
        other.load_state_dict(own.state_dict())
    return full
