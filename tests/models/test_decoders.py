"""The recycler on models that are no BERT: no padding token, no special tokens, causal attention, a whole decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

import actcache
from actcache import Recycler
from actcache.errors import CodecOverflowError, DocumentError, LowerHalfMismatchError
from tests.models.zoo import CAUSAL, CLASSIFY, KINDS, TOKENS

LAYER = 2
TEXTS = [f"document {i} says " + "la " * (i % 7) + "." for i in range(12)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bare_tokenizer(docstrings: list[str]) -> PreTrainedTokenizerFast:
    """Like GPT-2's: byte-level, and with no token for padding, beginning or separation."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(docstrings[:50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def make(name: str, head: Any, **options: Any) -> PreTrainedModel:
    kind = KINDS[name]
    field = "n_positions" if name == "gpt2" else "max_position_embeddings"
    limit = {} if name == "t5" else {field: 256}
    return kind.make(head, "sdpa", vocab_size=300, **{**limit, **options})


@pytest.mark.parametrize(("name", "head"), [("gpt2", CLASSIFY), ("llama", CLASSIFY), ("qwen2", TOKENS), ("t5", TOKENS)])
def test_filled_read_and_replayed(
    name: str, head: Any, bare_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # 299 is no token of any document here; as in practice, it lies in the vocabulary
    task = make(name, head, pad_token_id=299, eos_token_id=0)
    with Recycler(task, bare_tokenizer, layer=LAYER, store=tmp_path, dtype="float32") as recycler:
        assert recycler.recipe.max_length == (None if name == "t5" else 256)
        assert recycler.fill(TEXTS, progress=False).computed == len(TEXTS)
        reduced = recycler.reduce(task)
        seen = 0
        for batch in recycler.reader(TEXTS, batch_size=5, shuffle=True):
            with torch.no_grad():
                got = reduced(**batch.model_inputs()).logits
                for logits, i, n in zip(got, batch.documents.tolist(), batch.lengths.tolist(), strict=True):
                    ids = torch.tensor(bare_tokenizer(TEXTS[i])["input_ids"])
                    alone = task(input_ids=ids[None]).logits[0]
                    torch.testing.assert_close(logits[:n] if head is TOKENS else logits, alone, atol=1e-5, rtol=1e-5)
            seen += len(batch)
        assert seen == len(TEXTS)


def test_a_language_model_trains_from_the_store(bare_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The head is tied to the embeddings, and the padding has no token of its own."""
    task = make("gpt2", CAUSAL, pad_token_id=None)
    with Recycler(task, bare_tokenizer, layer=LAYER, store=tmp_path, dtype="float32") as recycler:
        reduced = recycler.reduce(task).train()
        optimizer = torch.optim.AdamW(reduced.parameters(), lr=3e-3)
        losses = []
        for _ in range(5):
            for batch in recycler.reader(TEXTS, batch_size=6, on_missing="compute"):
                labels = batch.token_ids.masked_fill(batch.attention_mask == 0, -100)
                loss = reduced(**batch.model_inputs(), labels=labels).loss
                if not losses:
                    ids, mask = batch.token_ids, batch.attention_mask
                    want = task.eval()(input_ids=ids, attention_mask=mask, labels=labels).loss
                    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.5
        assert len(recycler.space) == len(TEXTS)
        recycler.fill(TEXTS, progress=False)  # the lower half is what it was


def test_a_decoder_runs_whole(bare_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    task = make("t5", transformers.T5ForConditionalGeneration)
    encoder = make("t5", transformers.T5EncoderModel)
    encoder.encoder.load_state_dict(task.encoder.state_dict())
    # recorded with the encoder alone, replayed with the decoder
    with Recycler(encoder, bare_tokenizer, layer=LAYER, store=tmp_path, dtype="float32") as recycler:
        recycler.fill(TEXTS, progress=False)
        reduced = recycler.reduce(task)
        labels = torch.arange(3 * len(TEXTS)).reshape(-1, 3) % 250 + 5
        for batch in recycler.reader(TEXTS, labels=labels, batch_size=6):
            want = task(input_ids=batch.token_ids, attention_mask=batch.attention_mask, labels=batch.labels)
            got = reduced(**batch.model_inputs())
            torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            task.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.add_(1)
        with pytest.raises(LowerHalfMismatchError, match="fine-tuned"):
            recycler.reduce(task)


@pytest.mark.parametrize(
    ("name", "dtype"), [("gpt2", "float16"), ("llama", "bfloat16"), ("t5", "bfloat16"), ("gemma", "bfloat16")]
)
def test_each_family_has_its_own_dtype(
    name: str, dtype: str, bare_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make(name, KINDS[name].heads[0])
    with actcache.open(tmp_path) as store:
        recycler = Recycler(model, bare_tokenizer, layer=LAYER, store=store)
        assert recycler.recipe.dtype == dtype
        recycler.fill(TEXTS[:4], progress=False)
        assert Recycler(model, bare_tokenizer, layer=LAYER, store=store, dtype="float32").recipe.dtype == "float32"


def test_massive_activations(bare_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = make("llama", AutoModel)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.mul_(1e7)
    with Recycler(model, bare_tokenizer, layer=LAYER, store=tmp_path) as recycler:
        recycler.fill(TEXTS, progress=False)
        rows = np.concatenate([entry.activations for entry in recycler.space.get(recycler.keys(TEXTS))])
        assert np.abs(rows).max() > 65504
    with (
        Recycler(model, bare_tokenizer, layer=LAYER, store=tmp_path, dtype="float16") as recycler,
        pytest.raises(CodecOverflowError, match="bfloat16"),
    ):
        recycler.fill(TEXTS, progress=False)


def test_bad_documents(bare_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = make("gpt2", AutoModel)
    with Recycler(model, bare_tokenizer, layer=LAYER, store=tmp_path) as recycler:
        with pytest.raises(DocumentError, match=r"position 1.*empty"):  # not even special tokens
            recycler.fill(["good", ""], progress=False)
        with pytest.raises(DocumentError, match=r"0\.\.299"):
            recycler.fill([[5, 300]], progress=False)
    small = KINDS["gpt2"].make(AutoModel)
    with (
        Recycler(small, bare_tokenizer, layer=LAYER, store=tmp_path) as recycler,
        pytest.raises(DocumentError, match="another model"),
    ):
        recycler.fill(TEXTS, progress=False)
