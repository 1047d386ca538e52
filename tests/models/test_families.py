"""Every family and head, cut at every layer: outputs, losses and gradients are the full model's."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

from actcache.format.recipe import Recipe
from actcache.models import LowerHalf, base_model_of, family_of, lower_digest, reduce
from actcache.models import families as family_module
from tests.models.zoo import (
    ANSWER,
    CAUSAL,
    CLASSIFY,
    DIFFERENT,
    KINDS,
    documents,
    full_inputs,
    labels_for,
    mask_of,
    padded,
)
from tests.support import ROOT

TOLERANCE = 1e-5
CASES = [
    pytest.param(
        kind,
        head,
        attention,
        id=f"{name}-{head.__name__.removeprefix('AutoModelFor')}-{attention}",
        # Another attention of one head; a family that differs in no way of its own, with no head and as a classifier.
        marks=[pytest.mark.long]
        if head not in ((kind.heads[0],) if number else kind.heads if name in DIFFERENT else (kind.heads[0], CLASSIFY))
        else [],
    )
    for name, kind in KINDS.items()
    for number, attention in enumerate(kind.attention)
    for head in kind.heads
]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logger = logging.getLogger("actcache")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_alone(model: PreTrainedModel, ids: list[NDArray[np.int64]]) -> torch.Tensor:
    """The mean of what a question answering model loses on each document alone, answered by its first token."""
    losses = []
    for one in ids:
        inputs = {"input_ids": torch.tensor(one)[None], "attention_mask": torch.ones(1, len(one), dtype=torch.long)}
        losses.append(model(**inputs, start_positions=torch.tensor([0]), end_positions=torch.tensor([0])).loss)
    return torch.stack(losses).mean()


def compare(got: Any, want: Any, mask: torch.Tensor, ignored: set[str]) -> None:
    assert set(got.keys()) == set(want.keys()) - {"past_key_values"}
    for name in set(got.keys()) - ignored:
        mine, theirs = got[name], want[name]
        if mine.shape[:2] == mask.shape:
            mine, theirs = mine[mask.bool()], theirs[mask.bool()]
        torch.testing.assert_close(
            mine, theirs, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text, name=name: name + text
        )


def compare_gradients(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], model: PreTrainedModel, layer: int
) -> None:
    """Those of all upper parameters are there and equal; a copy of a tied weight is the only one more."""
    base = base_model_of(model)
    lower = {id(p) for part in family_of(base).lower_of(base, layer).values() for p in part.parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    upper = {name for name in want if id(named[name]) not in lower}
    assert upper
    assert upper <= set(got)
    assert all(id(named[name]) in lower and "layer" not in name for name in set(got) - upper)
    for name in upper:
        torch.testing.assert_close(got[name], want[name], atol=TOLERANCE, rtol=1e-4, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize(("kind", "head", "attention"), CASES)
def test_reduced_equals_full(kind: Any, head: Any, attention: str) -> None:
    model, ids = kind.make(head, attention), documents()
    base, family = base_model_of(model), family_of(base_model_of(model))
    layers = range(1, len(family.layers_of(base)))
    assert len(layers) == 3
    reduced = {layer: reduce(model, layer) for layer in layers}
    rows = {layer: LowerHalf(base, family, layer).run(ids) for layer in layers}
    for side in ("right", "left"):
        # The full model's own answers are no reference where its head looks at the first column, which is padding.
        ignored = {"pooler_output"} if side == "left" else set()
        if side == "left" and kind.first_token and (head is CLASSIFY or "PreTraining" in head.__name__):
            continue
        mask = mask_of(ids, side)
        labels = labels_for(model, mask)
        if head is CAUSAL and side == "left":  # a document's first token has nothing before it to be predicted from
            labels["labels"][torch.arange(len(ids)), mask.argmax(-1)] = -100
        want = model(**full_inputs(model, ids, side), **labels)
        loss = want.loss if labels else None
        if head is ANSWER:
            ignored = {"loss"}  # which sums over padding; each document's alone is the reference
            # but for decoders that see padding on the left
            loss = None if kind.config.model_type in ("t5", "mt5") and side == "left" else loss_alone(model, ids)
        expected = gradients(model, loss) if loss is not None else {}
        for layer in layers:
            batch = {"activations": padded(rows[layer], side), "token_ids": padded(ids, side), "attention_mask": mask}
            got = reduced[layer](**batch, **labels)
            compare(got, want, mask, ignored)
            if loss is not None:
                torch.testing.assert_close(got.loss, loss, atol=TOLERANCE, rtol=TOLERANCE)
                compare_gradients(gradients(reduced[layer], got.loss), expected, model, layer)


@pytest.mark.parametrize(
    ("name", "attention"), [(name, attention) for name, kind in KINDS.items() for attention in kind.attention]
)
def test_a_batch_gives_each_document_what_it_is_alone(name: str, attention: str) -> None:
    kind = KINDS[name]
    model, ids, layer = kind.make(kind.heads[0], attention), documents(seed=5), 2
    rows = LowerHalf(model, family_of(model), layer).run(ids)
    reduced = reduce(model, layer)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor(one)[None]).last_hidden_state[0] for one in ids])
        for side in ("right", "left"):
            mask = mask_of(ids, side)
            batch = {"activations": padded(rows, side), "token_ids": padded(ids, side), "attention_mask": mask}
            got = reduced(**batch).last_hidden_state[mask.bool()]
            torch.testing.assert_close(got, alone, atol=TOLERANCE, rtol=TOLERANCE)


#: Fields of configurations that change no number of a lower half (in eval mode, at the weights that there are).
WITHOUT_EFFECT = {
    # dropout, initialization, how weights are laid out or tied
    *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout", "dropout_rate", "embd_pdrop"),
    *("embedding_dropout", "hidden_dropout_prob", "mlp_dropout", "resid_pdrop"),
    *("initializer_cutoff_factor", "initializer_factor", "initializer_range"),
    *("pretraining_tp", "tie_word_embeddings"),
    # the vocabulary: what is in its rows is in the weights, which row is which token in the tokenizer
    *("vocab_size", "bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
    "decoder_start_token_id",
    # upper layers, heads, decoders, generation
    *("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_decoder_layers"),
    *("classifier_activation", "classifier_bias", "classifier_dropout", "classifier_pooling", "decoder_bias"),
    *("final_logit_softcapping", "legacy", "pooler_dropout", "pooler_hidden_act", "pooler_hidden_size", "qa_dropout"),
    *("scale_decoder_outputs", "seq_classif_dropout", "sparse_pred_ignore_index", "sparse_prediction", "use_cache"),
    *("summary_activation", "summary_first_dropout", "summary_last_dropout", "summary_proj_to_labels"),
    *("summary_type", "summary_use_proj"),
    # the backward pass
    "deterministic_flash_attn",
    # only the classes' own way to fields that are named: layer_types, sliding_window; dense_act_fn, is_gated_act
    *("_sliding_window_pattern", "max_window_layers", "use_sliding_window", "feed_forward_proj"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_field_of_a_configuration_is_named_or_known_to_have_no_effect(name: str) -> None:
    config = KINDS[name].configured()
    fields = set(type(config)().to_dict()) - set(PreTrainedConfig().to_dict())
    numeric = set(family_of_config(config).numeric_config)
    unknown = fields - numeric - WITHOUT_EFFECT
    assert not unknown, f"does {unknown} change the numbers of {name}'s lower half? Name it in the table, or here"
    assert numeric & WITHOUT_EFFECT <= {"pad_token_id"}  # which numbers RoBERTa's positions


def family_of_config(config: Any) -> Any:
    return family_module._FAMILIES[config.model_type]


def other(value: Any, absent: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool) or (value is None and isinstance(absent, bool)):
        return not value
    if isinstance(value, int | float):
        return value * 2 if value else 1
    if isinstance(value, str):
        return f"{value}_"
    if isinstance(value, list):
        return value[1:]
    if isinstance(value, dict):
        key, inner = next(iter(value.items()))
        return {**value, key: other(inner, None)}
    return 7 if value is None else None


@pytest.mark.parametrize("name", KINDS)
def test_every_numeric_value_is_part_of_the_identity(name: str) -> None:
    kind = KINDS[name]
    family = family_of_config(kind.configured())

    def fingerprint(config: Any) -> str:
        numbers = family.numbers_of(config)
        return Recipe(model="m", layer=1, hidden_size=32, weights="w", config=numbers).fingerprint

    base = fingerprint(kind.configured())
    assert fingerprint(kind.configured()) == base
    for field, absent in family.numeric_config.items():
        config = kind.configured()
        vars(config)[field] = other(getattr(config, field, absent), absent)  # past the validation of types
        assert fingerprint(config) != base, field
    for field in ("num_labels", "id2label"):
        assert field not in family.numeric_config


@pytest.mark.parametrize(
    "layers", [3, pytest.param(4, marks=pytest.mark.long)]
)  # the last is an upper one as the third
@pytest.mark.parametrize(
    "name", [name if name in (*DIFFERENT, "electra") else pytest.param(name, marks=pytest.mark.long) for name in KINDS]
)
def test_weights_beside_the_layers_are_part_of_the_identity(name: str, layers: int) -> None:
    """Of every parameter of the model: it is in the digest exactly when the lower half's numbers depend on it."""
    model = KINDS[name].make(KINDS[name].heads[0])
    base, ids = base_model_of(model), documents(lengths=(11,))
    family = family_of(base)
    # two layers, for a first layer alone does not depend on all of a relative bias
    lower, digest = LowerHalf(base, family, 2), lower_digest(base, family, 2)
    rows = np.concatenate(lower.run(ids))
    seen = set()
    for path, parameter in model.named_parameters():
        if f".{layers}." in path:
            continue
        with torch.no_grad():
            before = parameter.clone()
            noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.add_(noise)
            changes = not np.array_equal(np.concatenate(lower.run(ids)), rows)
            digested = lower_digest(base, family, 2) != digest
            parameter.copy_(before)
        assert digested or not changes, path  # never another's numbers
        part = ".".join(path.split(".")[:-1])
        if digested and not changes:
            # the softmax does not see key biases; there are no token types but 0 and few relative positions
            assert any(word in part for word in ("key", "k_proj", "in_proj", "pos_")) or "emb" in part, path
        seen.add(digested)
    assert seen == {True, False}


def test_the_documentation_describes_a_family_and_names_all(monkeypatch: pytest.MonkeyPatch) -> None:
    table = family_module._FAMILIES
    monkeypatch.setattr(family_module, "_FAMILIES", dict(table))
    text = (ROOT / "docs" / "models.md").read_text()
    for model_type, family in table.items():
        line = next(line for line in text.splitlines() if line.startswith("|") and f"`{model_type}`" in line)
        assert line.endswith(f"| {family.dtype} |"), model_type
    example = text.partition("```python\n")[2].partition("```")[0]
    exec(compile(example, "docs/models.md", "exec"), {})
    config = transformers.ErnieConfig(**{**KINDS["bert"].options, "use_task_id": True})
    model, ids = transformers.ErnieModel(config).eval(), documents(lengths=(6, 6))
    assert family_of(model).name == "ernie"
    rows = LowerHalf(model, family_of(model), 2).run(ids)
    batch = {"activations": torch.tensor(np.stack(rows)), "token_ids": torch.tensor(np.stack(ids))}
    with torch.no_grad():
        got, want = reduce(model, 2)(**batch), model(input_ids=batch["token_ids"])
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=TOLERANCE, rtol=TOLERANCE)
