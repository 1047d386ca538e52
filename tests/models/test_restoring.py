"""Repair that computes again: the numbers come back, and never from token ids that nothing vouches for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import RobertaProcessing
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

import actcache
from actcache import Recycler, Recyclers
from actcache.admin import recompute
from actcache.admin.recompute import RecordedModels, Restoration, repair_by_recomputing
from actcache.errors import DocumentError
from tests.support.backends import each
from tests.support.tiny import save_tiny

TEXTS = [f"Document {i} says " + "la " * (i % 7) + "." for i in range(12)]
PAIRS = [(f"question {i}", "and its answer " * (1 + i)) for i in range(3)]
IDS = [[2, 20 + i, 30, 3] for i in range(3)]
WORDS = [["some", "words", str(i)] for i in range(2)]
ALL = [*TEXTS, *PAIRS, *IDS, *WORDS]

Make = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def damage(store: Any, documents: Any, column: str = "values", **changes: Any) -> dict[bytes, Any]:
    """Flip a bit of these documents' rows, or token ids, in whatever files hold them; return what the entries were."""
    root = Path(str(store).partition(":")[2] or str(store))
    keys = [one if isinstance(one, bytes) else actcache.document_key(one) for one in documents]
    with actcache.open(store, "r") as opened:
        (recipe,) = [one for one in opened.recipes() if all(getattr(one, n) == v for n, v in changes.items())]
        with opened.space(recipe) as space:
            found = {
                key: (np.array(entry.activations), np.array(entry.token_ids), entry.extras)
                for key, entry in zip(keys, space.get(keys), strict=True)
            }
    for rows, ids, _ in found.values():
        wanted = (rows if column == "values" else ids).tobytes()
        count = 0
        for path in (root / "spaces" / recipe.fingerprint).rglob("*"):
            data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
            if (at := data.find(wanted)) >= 0:
                data[at + 4] ^= 1
                path.write_bytes(data)
                count += 1
        assert count
    return found


def mended(store: Any, model: Any, **options: Any) -> Restoration:
    """Repair; return what became of the first space that had lost something."""
    with actcache.open(store) as opened:
        done = repair_by_recomputing(opened, RecordedModels(model, device="cpu"), **options)
    assert not done.unreadable
    return next(one for one in done.spaces.values() if one.quarantined or one.missing or one.recomputed)


def check_back(store: Any, lost: dict[bytes, Any], **changes: Any) -> None:
    with actcache.open(store, "r") as opened:
        (recipe,) = [one for one in opened.recipes() if all(getattr(one, n) == v for n, v in changes.items())]
        with opened.space(recipe) as space:
            for (rows, ids, extras), entry in zip(lost.values(), space.get(list(lost)), strict=True):
                np.testing.assert_allclose(entry.activations, rows, rtol=0, atol=2e-5)
                np.testing.assert_array_equal(entry.token_ids, ids)
                assert set(entry.extras) == set(extras)
                for name, array in extras.items():
                    np.testing.assert_array_equal(entry.extras[name], array)
            assert space.verify().intact


@each(everyday=("zarr", "lmdb"))  # what follows is on hdf5
def test_from_the_corpus(kind: Any, saved: Path, tmp_path: Path) -> None:
    store, extras = kind.url(tmp_path / "store"), () if kind.name == "zarr" else ("spans", "word_ids", "type_ids")
    with Recycler.from_pretrained(saved, layer=2, store=store, dtype="float32", extras=extras) as recycler:
        recycler.fill(ALL, progress=False)
    chosen = [TEXTS[3], TEXTS[8], PAIRS[1], IDS[2], WORDS[0]]
    lost = damage(store, chosen)
    done = mended(store, saved, texts=lambda: iter(ALL))
    assert (set(done.quarantined), set(done.recomputed), done.missing) == (set(lost), set(lost), [])
    assert done.unable is None
    check_back(store, lost)
    with Recycler.from_pretrained(saved, layer=2, store=store, dtype="float32", extras=extras) as recycler:
        assert recycler.fill(ALL, progress=False).computed == 0
        assert recycler.verify(texts=chosen).ok


@pytest.mark.parametrize("column", ["values", "token_ids"])
def test_ids_that_nothing_vouches_for_are_not_computed(saved: Path, tmp_path: Path, column: str) -> None:
    """Damaged rows look like damaged ids: both wait for the texts, but what proves itself is back at once."""
    store = tmp_path / "store"
    with Recycler.from_pretrained(saved, layer=2, store=store, dtype="float32") as recycler:
        recycler.fill(ALL, progress=False)
    lost = damage(store, [TEXTS[3], PAIRS[0], IDS[1]], column)
    done = mended(store, saved)
    proven = [actcache.document_key(IDS[1])] if column == "values" else []
    assert done.recomputed == proven
    assert done.missing == sorted(lost.keys() - set(proven))
    # Run again with the texts: what lies in quarantine is known.
    done = mended(store, saved, texts=lambda: ["other texts", *ALL])
    assert (done.quarantined, set(done.recomputed), done.missing) == ([], lost.keys() - set(proven), [])
    check_back(store, lost)
    with actcache.open(store) as opened:
        assert all(
            not (one.recomputed or one.missing)
            for one in repair_by_recomputing(opened, RecordedModels(saved)).spaces.values()
        )


def test_from_another_layer(saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with Recyclers.from_pretrained(saved, layers=[1, 2], store=store, dtype="float32") as recyclers:
        recyclers.fill(ALL, progress=False)
    lost = damage(store, [TEXTS[3], TEXTS[5], PAIRS[0], WORDS[1]], layer=2)
    damage(store, [TEXTS[5]], layer=1)
    done = mended(store, saved)
    with actcache.open(store, "r") as opened:
        order = [recipe.layer for recipe in sorted(opened.recipes(), key=lambda one: one.fingerprint)]
    both = {actcache.document_key(TEXTS[5])}
    unclear = {actcache.document_key(PAIRS[0])}  # one text with a separator, or two: no type ids were stored
    if order[0] == 1:  # the first one to be repaired
        assert (done.recomputed, set(done.missing)) == ([], both)
    else:
        assert (set(done.recomputed), set(done.missing)) == (lost.keys() - both - unclear, both | unclear)
    mended(store, saved, texts=lambda: ALL)
    check_back(store, lost, layer=2)


def test_more_than_is_held_at_once(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_HELD", 60)
    store, told = tmp_path / "store", []
    with Recycler.from_pretrained(saved, layer=2, store=store, dtype="float32") as recycler:
        recycler.fill(TEXTS, progress=False)
    lost = damage(store, TEXTS)
    done = mended(store, saved, texts=lambda: TEXTS, progress=lambda *now: told.append(now))
    assert (set(done.recomputed), done.missing) == (set(lost), [])
    computed = [now for name, *now in told if "compute" in name]
    assert len(computed) > 3
    assert computed[-1] == [len(TEXTS), len(TEXTS)]
    check_back(store, lost)


@pytest.mark.parametrize("special_tokens", [True, False])
def test_pairs_are_not_taken_for_one_text(saved: Path, tmp_path: Path, special_tokens: bool) -> None:
    """Without special tokens nothing tells them apart, unless type ids were stored."""
    store, options = tmp_path / "store", {"dtype": "float32", "special_tokens": special_tokens}
    with Recycler.from_pretrained(saved, layer=1, store=store, **options) as recycler:
        recycler.fill(ALL, progress=False)
    with Recycler.from_pretrained(saved, layer=2, store=store, extras=["type_ids"], **options) as recycler:
        recycler.fill(ALL, progress=False)
    text, pair = actcache.document_key(TEXTS[1]), actcache.document_key(PAIRS[1])
    lost = damage(store, [TEXTS[1], PAIRS[1]], layer=1)
    done = mended(store, saved)  # from layer 2, which has type ids
    assert (set(done.recomputed), done.missing) == ({text, pair}, [])
    check_back(store, lost, layer=1)
    lost = damage(store, [TEXTS[1], PAIRS[1]], layer=2)
    done = mended(store, saved)  # from layer 1, which has none
    assert set(done.missing) == ({pair} if special_tokens else {text, pair})
    check_back(store, {key: one for key, one in lost.items() if key in done.recomputed}, layer=2)


def test_texts_that_token_ids_spell_exactly(make_model: Make, tmp_path: Path) -> None:
    folder, store = tmp_path / "model", tmp_path / "store"
    spelled = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]  # a byte a token
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(spelled)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "pad": "<pad>", "unk": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    ).save_pretrained(folder)
    make_model(AutoModel, "roberta", vocab_size=len(spelled)).save_pretrained(folder)
    texts = ["Whatever is  written, Café!", " with a space before", "ends with one "]
    with Recycler.from_pretrained(folder, layer=2, store=store, dtype="float32") as recycler:
        recycler.fill(texts, progress=False)
    lost = damage(store, texts)
    done = mended(store, folder)
    assert (set(done.recomputed), done.missing) == (set(lost), [])
    check_back(store, lost)
    damage(store, texts, "token_ids")
    assert (mended(store, folder).recomputed, len(done.quarantined)) == ([], 3)


def test_windows(saved: Path, tmp_path: Path) -> None:
    store, texts = tmp_path / "store", ["".join(f"many {i} words " for i in range(40)), *TEXTS]
    spec = actcache.windows(32, stride=8)
    with Recycler.from_pretrained(saved, layer=2, store=store, dtype="float32", too_long=spec) as recycler:
        recycler.fill(texts, progress=False)
        keys = recycler.keys(texts)
    lost = damage(store, [keys[1], keys[-1]])
    assert len(mended(store, saved, texts=lambda: texts, stride=4).missing) == 2
    done = mended(store, saved, texts=lambda: texts, stride=8)
    assert (set(done.recomputed), done.missing) == (set(lost), [])
    check_back(store, lost)


def test_what_is_refused(saved: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with Recycler.from_pretrained(saved, layer=2, store=store, dtype="float32") as recycler:
        recycler.fill(TEXTS, progress=False)
    lost = damage(store, TEXTS[:2])
    done = mended(store, save_tiny(tmp_path / "other", seed=1), texts=lambda: TEXTS)
    assert "other weights" in str(done.unable)
    assert (set(done.quarantined), done.recomputed, set(done.missing)) == (set(lost), [], set(lost))
    with pytest.raises(DocumentError, match="position 1"):
        mended(store, saved, texts=lambda: ["a text", ""])
    space = next((store / "spaces").iterdir())
    canaries = (space / "canaries.npz").read_bytes()
    (space / "canaries.npz").write_bytes(b"damaged")
    assert "canaries" in str(mended(store, saved, texts=lambda: TEXTS).unable)
    (space / "canaries.npz").write_bytes(canaries)
    folder = space / "quarantine"
    (folder / f"{'0' * 12}-{'0' * 16}.safetensors").write_bytes(b"no such file")
    assert set(mended(store, saved, texts=lambda: TEXTS).recomputed) == set(lost)
    check_back(store, lost)
