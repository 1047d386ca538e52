"""Sites: any layer, and any module's input or output, against plain forward hooks; and what their digests cover."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModel, PreTrainedModel

import actcache
from actcache import Recycler, Recyclers
from actcache.errors import LayerError, UnsupportedModelError, UsageError
from actcache.models.families import Family, family_of, numbers
from actcache.models.lower_half import LowerHalf
from actcache.models.sites import Site, site_of
from actcache.models.weights import lower_digest, lower_digests
from tests.models.zoo import KINDS, Kind

_DECODER = KINDS["qwen3"].options
_DECODERS = numbers("hidden_size", "num_attention_heads", "rope_parameters", "max_position_embeddings")


def _described(name: str, embeddings: str) -> Family:
    return Family(
        name, (name,), layers="layers", embeddings=(embeddings,), numeric_config=_DECODERS, positions_in_layers=True
    )


#: Models, their families, and the attention and the MLP of their third layer.
MODELS: dict[str, tuple[Kind, Family | None, str, str]] = {
    "qwen3": (KINDS["qwen3"], None, "layers.2.self_attn", "layers.2.mlp"),
    "gpt_neox": (
        Kind(transformers.GPTNeoXConfig, {**_DECODER, "rotary_pct": 0.5}),
        _described("gpt_neox", "embed_in"),
        "layers.2.attention",
        "layers.2.mlp",
    ),
    "mistral": (
        Kind(transformers.MistralConfig, {**_DECODER, "sliding_window": 3}),
        _described("mistral", "embed_tokens"),
        "layers.2.self_attn",
        "layers.2.mlp",
    ),
    "bert": (KINDS["bert"], None, "encoder.layer.2.attention", "encoder.layer.2.output"),
}
LAYERS = 4


def tiny(name: str) -> tuple[PreTrainedModel, Family]:
    kind, described, _, _ = MODELS[name]
    model = kind.make(AutoModel)
    return model, described or family_of(model)


@contextmanager
def hooked(model: PreTrainedModel, site: Site) -> Iterator[list[torch.Tensor]]:
    """Yield what a plain hook sees at a site while the model is called."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(site.module)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(module: Any, args: Any, output: Any) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    if site.side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def plain(model: PreTrainedModel, site: Site, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a document's rows at a site: the whole model runs on it alone, and a hook looks on."""
    tokens = torch.from_numpy(ids)[None]
    with hooked(model, site) as seen, torch.no_grad():
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert len(seen) == 1
    return seen[0][0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_paths(name: str) -> None:
    model, family = tiny(name)
    path = family.layers
    assert site_of(model, family, 0) == Site(f"{path}.0", "input") == site_of(model, family, f"{path}.0:input")
    assert (
        site_of(model, family, 4)
        == Site(f"{path}.3")
        == site_of(model, family, -1)
        == site_of(model, family, f"{path}.3")
    )
    assert [site_of(model, family, k).name for k in (0, 2, 4, -1, -5)] == [0, 2, 4, 4, 0]
    assert site_of(model, family, f"{path}.1").layer is None  # perhaps something is added to it before layer 3
    mlp = MODELS[name][3]
    assert str(site_of(model, family, f"{mlp}:input")) == f"{mlp}:input"
    assert str(site_of(model, family, f"{mlp}:output")) == mlp
    assert site_of(model, family, f"{model.base_model_prefix}.{mlp}") == Site(mlp)
    assert site_of(model, family, f"layers.{mlp.removeprefix(path + '.')}") == Site(mlp)
    last = LowerHalf(model, family, "last").site
    expected = {"qwen3": "norm", "mistral": "norm", "gpt_neox": "final_layer_norm", "bert": 4}
    assert last.name == expected[name]


def test_what_is_no_site() -> None:
    model, family = tiny("bert")
    for layer in (5, -6, 1.0, True, None):
        with pytest.raises(LayerError, match=r"1\.\.4"):
            site_of(model, family, layer)  # type: ignore[arg-type]
    for path in ("encoder.layer.4.output", "encoder.layer.2.mlp", "mlp", "", ":input", "encoder..layer"):
        with pytest.raises(LayerError, match="no module"):
            site_of(model, family, path)
    with pytest.raises(LayerError, match=r"encoder\.layer\.2\.attention"):  # what there is
        site_of(model, family, "encoder.layer.2.atention")
    for path, why in (
        ("pooler", r"gives a tensor \[2, 32\]"),
        ("encoder.layer", "not at all"),
        ("embeddings:input", "no"),
    ):
        with pytest.raises(UnsupportedModelError, match=why):
            _ = LowerHalf(model, family, path).hidden_size


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_what_a_hook_sees(name: str) -> None:
    model, family = tiny(name)
    _, _, attention, mlp = MODELS[name]
    places = [0, 2, LAYERS, "last", attention, mlp, f"{mlp}:input"]
    halves = {place: LowerHalf(model, family, place) for place in places}
    sites = list({half.site for half in halves.values()})
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 90, length) for length in (7, 1, 12)]
    for ids in documents:
        together = halves[0].run_at(sites, [ids])
        for half in halves.values():
            expected = plain(model, half.site, ids)
            np.testing.assert_array_equal(together[half.site][0], expected)
            np.testing.assert_array_equal(half.run([ids])[0], expected)
            assert half.hidden_size == expected.shape[-1]
    padded = halves[0].run_at(sites, documents)
    for site in sites:
        for ids, rows in zip(documents, padded[site], strict=True):
            np.testing.assert_allclose(rows, plain(model, site, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_one_fill_records_what_hooks_see(name: str, tokenizer: Any, tmp_path: Path) -> None:
    kind, _, attention, mlp = MODELS[name]
    model = kind.make(AutoModel, vocab_size=30522)
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, 30000, length) for length in (7, 1, 12)]
    with Recyclers(
        model,
        tokenizer,
        layers=[0, 2, LAYERS, "last"],
        sites=[attention, mlp],
        store=tmp_path / "store",
        dtype="float32",
    ) as recyclers:
        report = recyclers.fill(documents, token_budget=1, progress=False)  # a document a batch
        assert (report.computed, len(recyclers)) == (3, 6)
        assert len(report.spaces) == (5 if name == "bert" else 6)  # which has no final norm
        assert recyclers.fill(documents, progress=False).computed == 0
        for recycler in recyclers.values():
            site = recycler.agreement.lower.site
            for ids, entry in zip(documents, recycler.space.get(recycler.keys(documents)), strict=True):
                np.testing.assert_array_equal(entry.activations, plain(model, site, ids))
            assert recycler.verify().ok
        recyclers[mlp].space.delete(recyclers[mlp].keys(documents[:1]))
        assert recyclers.fill(documents, progress=False).computed == 1
    store = actcache.open(tmp_path / "store")
    with Recycler(model, tokenizer, site=mlp, store=store, dtype="float32") as alone:
        assert not alone.space.created
        batch = next(iter(alone.reader(documents, batch_size=3)))
        assert batch.activations.shape == (3, 12, alone.recipe.hidden_size)
    store.close()


def test_canaries_of_all_sites_are_computed_by_one_pass(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KINDS["bert"].make(AutoModel, vocab_size=30522)
    passes: list[int] = []
    original = LowerHalf._forward

    def counted(self: LowerHalf, inputs: Any, *rest: Any) -> Any:
        passes.append(len(inputs["input_ids"]))
        return original(self, inputs, *rest)

    monkeypatch.setattr(LowerHalf, "_forward", counted)
    counts = []
    for number, layers in enumerate(([2], "all")):
        for _ in range(2):  # canaries are made, and then compared
            passes.clear()
            with Recyclers(model, tokenizer, layers=layers, store=tmp_path / str(number)) as recyclers:
                recyclers.fill([np.arange(3, 9)], progress=False)
            counts.append(len(passes))
    one_made, one_compared, all_made, all_compared = counts
    assert all_made - one_made < 5  # not five times as many
    # And three of the documents at hand are computed again for each space.
    assert all_compared - one_compared <= 8


def test_widths_and_several_places_at_once(tokenizer: Any, tmp_path: Path) -> None:
    model = KINDS["bert"].make(AutoModel, vocab_size=30522)
    sites = ["encoder.layer.1.intermediate", "encoder.layer.1.output:input"]
    with Recyclers(model, tokenizer, layers="all", sites=sites, store=tmp_path / "store") as recyclers:
        assert list(recyclers) == [0, 1, 2, 3, 4, *sites]
        assert [recyclers[site].recipe.hidden_size for site in sites] == [48, 48]
        recyclers.fill([np.arange(3, 9)], progress=False)
        assert recyclers[sites[0]].recipe.fingerprint != recyclers[sites[1]].recipe.fingerprint
    with pytest.raises(UsageError, match=r"Recyclers\.from_pretrained"):
        Recycler.from_pretrained("anything", layers="all", store=tmp_path / "store")
    with pytest.raises(UnsupportedModelError, match="pooler"):
        Recyclers(model, tokenizer, sites=["pooler"], store=tmp_path / "store")


@pytest.mark.parametrize("name", MODELS)
def test_each_weight_below_a_site_is_in_its_digest_and_none_above(name: str) -> None:
    kind, described, attention, mlp = MODELS[name]
    model = kind.make(AutoModel, num_hidden_layers=2, vocab_size=20, layer_types=None)
    family = described or family_of(model)
    attention, mlp = attention.replace(".2.", ".1."), mlp.replace(".2.", ".1.")
    halves = [LowerHalf(model, family, place) for place in (0, 1, 2, "last", attention, mlp, f"{mlp}:input")]
    sites = list(dict.fromkeys(half.site for half in halves))
    before = lower_digests(model, family, sites)
    assert len(set(before.values())) == len(before)
    assert [lower_digest(model, family, site) for site in sites] == list(before.values())
    ids = np.arange(3, 15)
    rows = halves[0].run_at(sites, [ids])
    below = {site: _below(model, family, site) for site in sites}
    for parameter_name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.5)
        changed, moved = lower_digests(model, family, sites), halves[0].run_at(sites, [ids])
        for site in sites:
            differs = changed[site] != before[site]
            same_rows = np.array_equal(moved[site][0], rows[site][0])
            assert differs or same_rows, (site, parameter_name)  # or wrong rows would be served
            assert differs == (parameter_name in below[site]), (site, parameter_name)
        parameter.data.copy_(kept)
    assert lower_digests(model, family, sites) == before


def _below(model: PreTrainedModel, family: Family, site: Site) -> set[str]:
    """Return the parameters of what is called before a site, by plain hooks; those of whole layers before a layer."""
    names = [name for name, _ in model.named_parameters()]
    if site.layer == 1:
        return {name for name in names if name.startswith(("embed", f"{family.layers}.0."))}
    order: list[str] = []
    handles = []
    for path, module in model.named_modules():
        if module._parameters:
            handles.append(module.register_forward_hook(lambda *_, path=path: order.append(path)))
    module = model.get_submodule(site.module)
    if site.side == "input":
        handles.append(module.register_forward_pre_hook(lambda *_: order.append("stop"), prepend=True))
    else:
        handles.append(module.register_forward_hook(lambda *_: order.append("stop")))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 15)[None])
    for handle in handles:
        handle.remove()
    called = set(order[: order.index("stop")])
    return {name for name in names if name.rpartition(".")[0] in called}
