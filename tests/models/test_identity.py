"""Whatever a lower half's forward can read: a model that differs in it is never served the other one's numbers.

One thing at a time is changed in a copy of a small model. The copy then meets a store that the original has filled, by
every way that leads to stored rows. Right answers are three: another space, a refusal by name, a canary that differs.
The oracle is the copy's own forward: where a way goes through, its rows have to be those.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing._internal.two_tensor import TwoTensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import actcache
from actcache.errors import ActcacheError, CanaryError, LowerHalfMismatchError, ModelError, NonFiniteError
from actcache.models import LowerHalf, base_model_of, canary, family_of, lower_digest
from actcache.models.canary import relative_error
from actcache.models.recycler import Recycler
from actcache.models.recyclers import Recyclers
from actcache.models.weights import leaves
from tests.models.zoo import KINDS
from tests.support import ROOT

LAYER = 2
TEXTS = [f"document {i} of a few " + "words " * (i % 7) for i in range(12)]


def bert() -> PreTrainedModel:
    return KINDS["bert"].make(AutoModelForSequenceClassification, max_position_embeddings=128)


def llama() -> PreTrainedModel:
    return KINDS["llama"].make(AutoModelForSequenceClassification, max_position_embeddings=2048)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a letter; copies of it are cheap."""
    backend = Tokenizer(WordLevel({f"[{i}]": i for i in range(3)} | {chr(i): i - 29 for i in range(32, 127)}, "[1]"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[1]", pad_token="[0]", eos_token="[2]")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- what can be changed ----------------------------------------------------------------------------------------------


def layer_of(model: PreTrainedModel, number: int = 1) -> Any:
    base = base_model_of(model)
    return family_of(base).layers_of(base)[number - 1]


def linear_of(model: PreTrainedModel) -> nn.Linear:
    return next(module for module in layer_of(model).modules() if isinstance(module, nn.Linear))


def parameter(model: PreTrainedModel) -> None:
    linear_of(model).weight.data *= 1.2


def word_embedding(model: PreTrainedModel) -> None:
    model.get_input_embeddings().weight.data[40:] *= 1.5


def steer(model: PreTrainedModel, where: str, put: Callable[[nn.Module], None], get: Callable[[Any], Any]) -> None:
    base = base_model_of(model)
    owner = {"layer": layer_of(model), "base": base, "upper": layer_of(model, 4)}[where]
    put(owner)
    layer_of(model).register_forward_hook(lambda module, args, output: output + get(owner))


def of_kind(put: Callable[[nn.Module], None], get: Callable[[Any], Any], where: str) -> Callable[[Any], None]:
    return lambda model: steer(model, where, put, get)


VECTOR = torch.linspace(-1, 1, 32)


def buffer(owner: nn.Module) -> None:
    owner.register_buffer("steering", VECTOR.clone())


def loose_buffer(owner: nn.Module) -> None:
    owner.register_buffer("steering", VECTOR.clone(), persistent=False)


def attribute(owner: nn.Module) -> None:
    owner.steering = VECTOR.clone()


def in_a_dict(owner: nn.Module) -> None:
    owner.vectors = {"a": [VECTOR.clone()]}


class WithState(nn.Module):
    """Keeps a number where no state dict looks for tensors."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def extra_state(owner: nn.Module) -> None:
    owner.extra = WithState({"scale": 0.5, "name": "x"}).eval()


def rotary_in_half_precision(model: PreTrainedModel) -> None:
    rotary = base_model_of(model).rotary_emb
    rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16).float()


def another_theta(model: PreTrainedModel) -> None:
    rotary = base_model_of(model).rotary_emb
    rotary.inv_freq = rotary.inv_freq**1.1


def steering_number(model: PreTrainedModel) -> None:
    layer_of(model).register_forward_hook(lambda module, args, output: output * 1.01)


def another_epsilon(model: PreTrainedModel) -> None:
    next(m for m in layer_of(model).modules() if isinstance(m, nn.LayerNorm)).eps = 0.1


def another_scale(model: PreTrainedModel) -> None:
    layer_of(model).attention.self.scaling *= 1.1


def another_activation(model: PreTrainedModel) -> None:
    layer_of(model).intermediate.intermediate_act_fn = nn.ReLU().eval()


def another_forward(model: PreTrainedModel) -> None:
    layer, original = layer_of(model), layer_of(model).forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.01


def configuration(model: PreTrainedModel) -> None:
    base_model_of(model).config.layer_norm_eps = 0.1
    for module in base_model_of(model).modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1


def lora(model: PreTrainedModel) -> None:
    linear = linear_of(model)
    linear.lora = nn.Linear(linear.in_features, linear.out_features).eval()
    linear.register_forward_hook(lambda module, args, output: output + module.lora(args[0]))


CHANGES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], None]]] = {
    "parameter": (bert, parameter),
    "word embedding": (bert, word_embedding),
    "hook": (bert, steering_number),
    "number: epsilon": (bert, another_epsilon),
    "number: scaling": (bert, another_scale),
    "module without tensors": (bert, another_activation),
    "forward": (bert, another_forward),
    "configuration": (bert, configuration),
    "added module": (bert, lora),
    "rotary frequencies rounded": (llama, rotary_in_half_precision),
    "rotary frequencies": (llama, another_theta),
}
for _name, _put, _get in (
    ("buffer", buffer, lambda owner: owner.steering),
    ("loose buffer", loose_buffer, lambda owner: owner.steering),
    ("attribute", attribute, lambda owner: owner.steering),
    ("attribute in a dict", in_a_dict, lambda owner: owner.vectors["a"][0]),
    ("extra state", extra_state, lambda owner: owner.extra.state["scale"]),
):
    for _where in ("layer", "base", "upper") if _put is loose_buffer else ("layer", "base"):
        CHANGES[f"{_name} at the {_where}"] = bert, of_kind(_put, _get, _where)


@pytest.fixture(params=list(CHANGES))
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and one that differs in a thing that matters."""
    make, change = CHANGES[request.param]
    first, second = make(), make()
    change(second)
    return first, second


@pytest.fixture
def store(tmp_path: Path) -> Iterator[actcache.Store]:
    with actcache.open(tmp_path / "store") as opened:
        yield opened


def rows_of(model: PreTrainedModel, batch: Any) -> list[np.ndarray[Any, Any]]:
    """What the model itself makes of the documents of a batch, each alone."""
    base = base_model_of(model)
    lower = LowerHalf(base, family_of(base), LAYER)
    ids = [row[mask.bool()].numpy() for row, mask in zip(batch.token_ids, batch.attention_mask, strict=True)]
    return [rows for one in ids for rows in lower.run([one])]


def by_fill(recycler: Recycler) -> None:
    recycler.fill(TEXTS, progress=False)
    compare(recycler)


def by_reader(recycler: Recycler) -> None:
    recycler.reader(TEXTS, on_missing="compute", batch_size=len(TEXTS))
    compare(recycler)


def by_reduce(recycler: Recycler) -> None:
    recycler.reduce(recycler_model(recycler))
    compare(recycler)


def recycler_model(recycler: Recycler) -> PreTrainedModel:
    return recycler.agreement.lower.base_model  # a base model is a task model, too


def compare(recycler: Recycler) -> None:
    for batch in recycler.reader(TEXTS, on_missing="compute", batch_size=len(TEXTS)):
        for mine, row, mask in zip(
            rows_of(recycler_model(recycler), batch), batch.activations, batch.attention_mask, strict=True
        ):
            np.testing.assert_allclose(row[mask.bool()].numpy(), mine, atol=1e-3 * np.abs(mine).max())


WAYS = {"fill": by_fill, "reader": by_reader, "reduce": by_reduce}


def fill(store: Any, model: PreTrainedModel, tokenizer: Any) -> None:
    with Recycler(model, tokenizer, layer=LAYER, store=store, dtype="float32", max_length=128) as recycler:
        recycler.fill(TEXTS, progress=False)


# --- the ways ---------------------------------------------------------------------------------------------------------


def test_the_change_matters(pair: Any, tokenizer: Any) -> None:
    """So that nothing below passes for want of a difference."""
    texts = [np.array(tokenizer(text)["input_ids"]) for text in TEXTS]
    long = np.tile(texts[0], 200)[:1500]  # what is wrong with rotary frequencies shows far from the beginning
    lower = [LowerHalf(base_model_of(model), family_of(base_model_of(model)), LAYER) for model in pair]
    first, second = (
        np.concatenate(half.run([long]) if hasattr(half.base_model, "rotary_emb") else half.run(texts))
        for half in lower
    )
    assert np.linalg.norm(first - second) > 2e-4 * np.linalg.norm(first)


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.long) for turn in (1, 2))])
def test_in_one_process_and_after_all_documents_are_present(
    pair: Any, turn: int, request: pytest.FixtureRequest, store: actcache.Store, tokenizer: Any
) -> None:
    """Each change by one of the ways in a turn."""
    first, second = pair
    fill(store, first, tokenizer)
    number = list(CHANGES).index(request.node.callspec.params["pair"])
    for way in [list(WAYS.values())[(number + turn) % len(WAYS)]]:
        with reported(), Recycler(second, tokenizer, layer=LAYER, store=store, dtype="float32", max_length=128) as mine:
            way(mine)
    if (number + turn) % len(WAYS) == 0:
        with (
            reported(),
            Recyclers(second, tokenizer, layers=[LAYER, 3], store=store, dtype="float32", max_length=128) as several,
        ):
            several.fill(TEXTS, progress=False)
            compare(several[LAYER])


#: Every day each change is tried in the one way or in the other.
_EVERY_SECOND = list(CHANGES)[::2]


@pytest.mark.parametrize(
    "name", [name if name in _EVERY_SECOND else pytest.param(name, marks=pytest.mark.long) for name in CHANGES]
)
def test_changed_after_the_recycler_was_made(name: str, store: actcache.Store, tokenizer: Any) -> None:
    make, change = CHANGES[name]
    for way in (Recycler.fill, Recycler.reader):
        model = make()
        with Recycler(model, tokenizer, layer=LAYER, store=store, dtype="float32", max_length=128) as recycler:
            recycler.fill(TEXTS, progress=False)
            change(model)
            with pytest.raises((LowerHalfMismatchError, CanaryError)):
                way(recycler, TEXTS)


@pytest.mark.parametrize(
    "pair",
    [pytest.param(name, marks=pytest.mark.long) if name in _EVERY_SECOND else name for name in CHANGES],
    indirect=True,
)
def test_another_task_model_is_not_reduced(pair: Any, store: actcache.Store, tokenizer: Any) -> None:
    first, second = pair
    with Recycler(first, tokenizer, layer=LAYER, store=store, dtype="float32", max_length=128) as recycler:
        with pytest.raises(LowerHalfMismatchError):  # nothing is stored yet
            recycler.reduce(second)
        recycler.fill(TEXTS[:1], progress=False)
        with pytest.raises(LowerHalfMismatchError):
            recycler.reduce(second)
        recycler.reduce(first)


class reported:
    """Lets what names the difference pass: ``LowerHalfMismatchError``, ``CanaryError``."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> bool:
        return isinstance(error, LowerHalfMismatchError | CanaryError)


OTHER_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[2])
from tests.models import test_identity as t
import actcache, torch

torch.set_num_threads(1)
tokenizer = t.word_tokenizer()
found = {}
for name, ways in json.loads(sys.argv[3]).items():
    make, change = t.CHANGES[name]
    model = make()
    change(model)
    with actcache.open(sys.argv[1]) as store:
        for way in ways:
            go = t.WAYS[way]
            try:
                with t.Recycler(
                    model, tokenizer, layer=t.LAYER, store=store, dtype="float32", max_length=128
                ) as recycler:
                    go(recycler)
                found[f"{name}, {way}"] = "its own"
            except (t.LowerHalfMismatchError, t.CanaryError) as error:
                found[f"{name}, {way}"] = type(error).__name__
print(json.dumps(found))
"""


def test_in_another_process(tmp_path: Path, tokenizer: Any) -> None:
    """Each change by one of the ways, which all are gone in this process."""
    ways = {name: {list(WAYS)[i % len(WAYS)]} for i, name in enumerate(CHANGES)}
    for name in ("hook", "loose buffer at the base"):
        ways[name].add("fill")
    in_another_process(tmp_path, tokenizer, {name: sorted(chosen) for name, chosen in ways.items()})


@pytest.mark.long
def test_in_another_process_by_every_way(tmp_path: Path, tokenizer: Any) -> None:
    in_another_process(tmp_path, tokenizer, {name: list(WAYS) for name in CHANGES})


def in_another_process(tmp_path: Path, tokenizer: Any, ways: dict[str, list[str]]) -> None:
    for make in (bert, llama):
        fill(tmp_path / "store", make(), tokenizer)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "store"), str(ROOT), json.dumps(ways)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert ways.keys() == CHANGES.keys()
    assert len(found) == sum(map(len, ways.values()))
    assert set(found.values()) == {"its own", "CanaryError"}
    assert found["loose buffer at the base, fill"] == "its own"
    assert found["hook, fill"] == "CanaryError"


# --- weights that are no plain tensors --------------------------------------------------------------------------------


def digest(model: PreTrainedModel) -> str:
    base = base_model_of(model)
    return lower_digest(base, family_of(base), LAYER)


def scaled(factor: float) -> PreTrainedModel:
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= factor
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_parameters_count() -> None:
    one, same, other = (
        torch.ao.quantization.quantize_dynamic(scaled(factor), {nn.Linear}, dtype=torch.qint8)
        for factor in (1.0, 1.0, 1.3)
    )
    assert digest(one) == digest(same) != digest(other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_one_scale_for_a_batch_is_refused(store: actcache.Store, tokenizer: Any) -> None:
    model = torch.ao.quantization.quantize_dynamic(bert(), {nn.Linear}, dtype=torch.qint8).eval()
    with Recycler(model, tokenizer, layer=LAYER, store=store) as recycler:
        with pytest.raises(actcache.errors.UnsupportedModelError, match="by the others of its batch"):
            recycler.fill(TEXTS, progress=False)
        assert len(recycler.space) == 0


def test_wrapped_tensors_count() -> None:
    def parts(a: float, b: float) -> dict[str, Any]:
        found = leaves("weight", TwoTensor(torch.full((3,), a), torch.full((3,), b)))
        return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in found}

    assert parts(1.0, 2.0) == parts(1.0, 2.0) != parts(1.0, 3.0)
    assert parts(1.0, 2.0)["weight.a"] == [1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_and_negated_tensors_count() -> None:
    def with_attribute(value: torch.Tensor) -> str:
        model = bert()
        layer_of(model).register_buffer("steering", value, persistent=False)
        return digest(model)

    dense = torch.eye(3)
    seen = {
        with_attribute(value)
        for value in (
            dense,
            dense.to_sparse(),
            dense.to_sparse_csr(),
            (dense * 2).to_sparse(),
            torch._neg_view(dense),
            torch.complex(dense, dense).conj(),
            torch.complex(dense, dense),
            torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
            torch.quantize_per_tensor(dense, 0.2, 0, torch.qint8),
            torch.quantize_per_channel(dense, torch.ones(3), torch.zeros(3), 0, torch.qint8),
        )
    }
    assert len(seen) == 10
    assert with_attribute(torch._neg_view(dense)) == with_attribute(-dense)


@pytest.mark.parametrize("state", [object(), {"a": {1, 2}}, [lambda: 0]], ids=["object", "set", "function"])
def test_what_cannot_be_hashed_is_refused_by_name(state: Any, store: actcache.Store, tokenizer: Any) -> None:
    model = bert()
    layer_of(model).extra = WithState(state)
    with pytest.raises(ModelError, match=r"layers/1/extra._extra_state.* of the lower half is a .*cannot be told"):
        Recycler(model, tokenizer, layer=LAYER, store=store)
    layer_of(model).extra = WithState({"a": (1, None, 2.5, b"x", np.arange(3), torch.float16, "text")})
    Recycler(model, tokenizer, layer=LAYER, store=store).close()


# --- what must not count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_running_or_training_a_model_changes_no_identity(name: str) -> None:
    model = KINDS[name].make(AutoModel)
    before = digest(model)
    lower = LowerHalf(model, family_of(model), LAYER)
    lower.run([np.arange(20) % 90 + 3, np.arange(5) + 3])
    assert digest(model) == before
    training = copy.deepcopy(model).train()
    assert digest(training) == before
    assert all(module.training for module in training.modules())
    with torch.no_grad():
        for parameter in family_of(model).layers_of(training)[LAYER].parameters():
            parameter.add_(1)
    assert digest(training) == before


def test_what_another_processor_rounds_otherwise_is_the_same() -> None:
    one, other = llama(), llama()
    rotary = base_model_of(other).rotary_emb
    rotary.inv_freq = torch.nextafter(rotary.inv_freq, torch.zeros(()))  # pow() differs so much between AVX2 and AVX512
    assert digest(one) == digest(other)
    rotary.inv_freq = rotary.inv_freq * (1 + 1e-5)
    assert digest(one) != digest(other)


def test_half_precision_keeps_or_rounds_rotary_frequencies(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    cast = AutoModel.from_pretrained(tmp_path / "model").eval().to(torch.bfloat16)
    assert torch.equal(loaded.layers[0].mlp.up_proj.weight, cast.layers[0].mlp.up_proj.weight)
    assert loaded.rotary_emb.inv_freq.dtype == torch.float32 != cast.rotary_emb.inv_freq.dtype
    assert digest(loaded) != digest(cast)


def test_unchecked_in_so_many_words(store: actcache.Store, tokenizer: Any) -> None:
    fill(store, bert(), tokenizer)
    hooked = bert()
    steering_number(hooked)
    options: dict[str, Any] = {"layer": LAYER, "store": store, "dtype": "float32", "max_length": 128}
    with pytest.raises(CanaryError):
        Recycler(hooked, tokenizer, **options)
    with Recycler(hooked, tokenizer, check_canaries=False, **options) as recycler:
        assert recycler.fill(TEXTS, progress=False).computed == 0
        recycler.reduce(bert())


def flattened(model: PreTrainedModel) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())


def upper_parameter(model: PreTrainedModel) -> None:
    layer_of(model, LAYER + 1).gate = nn.Parameter(torch.ones(3))


def compiled(model: PreTrainedModel) -> None:
    base_model_of(model).encoder.layer[0] = torch.compile(layer_of(model), backend="eager")


def capturing(model: PreTrainedModel) -> None:
    layer_of(model).register_forward_hook(lambda module, args, output: setattr(module, "seen", output.detach()))


def loss_weights(model: PreTrainedModel) -> None:
    base_model_of(model).class_weights = torch.ones(3)


@pytest.mark.parametrize("change", [flattened, upper_parameter, compiled, capturing, loss_weights])
def test_what_the_lower_half_does_not_read_is_no_matter(
    change: Callable[[PreTrainedModel], None], store: actcache.Store, tokenizer: Any
) -> None:
    fill(store, bert(), tokenizer)
    changed = bert()
    change(changed)
    assert digest(changed) == digest(bert())
    with Recycler(changed, tokenizer, layer=LAYER, store=store, dtype="float32", max_length=128) as recycler:
        for _ in range(2):
            assert recycler.fill(TEXTS, progress=False).computed == 0
        recycler.reduce(changed)


def test_a_state_dict_that_leaves_something_out() -> None:
    def secretive(factor: float) -> PreTrainedModel:
        model = bert()
        linear = linear_of(model)
        linear.weight.data *= factor

        def forget(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            del state[prefix + "weight"]

        linear._register_state_dict_hook(forget)
        return model

    assert digest(secretive(1.0)) != digest(secretive(1.3))


def test_weights_beside_the_layers_that_are_not_in_memory() -> None:
    model = llama()
    base_model_of(model).rotary_emb.to("meta")
    with pytest.raises(ModelError, match=r"inv_freq is on the meta device"):
        digest(model)


def test_models_of_few_positions() -> None:
    digest(KINDS["bert"].make(AutoModel, max_position_embeddings=4))
    digest(KINDS["roberta"].make(AutoModel, max_position_embeddings=8))


# --- what canaries alone would not see -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, llama])
def test_a_hook_of_the_next_layer_is_replayed_and_not_recorded(
    make: Callable[[], PreTrainedModel], store: actcache.Store, tokenizer: Any
) -> None:
    model = make()
    model.config.pad_token_id = 0
    layer_of(model, LAYER + 1).register_forward_pre_hook(lambda module, args: (args[0] + VECTOR, *args[1:]))
    with Recycler(model, tokenizer, layer=LAYER, store=store, dtype="float32", max_length=128) as recycler:
        recycler.fill(TEXTS, progress=False)
        reduced = recycler.reduce(model)
        [batch] = recycler.reader(TEXTS, batch_size=len(TEXTS))
        with torch.no_grad():
            full = model(input_ids=batch.token_ids.long(), attention_mask=batch.attention_mask).logits
            torch.testing.assert_close(reduced(**batch.model_inputs()).logits, full, atol=1e-5, rtol=1e-5)


def test_weights_that_change_while_documents_are_computed(store: actcache.Store, tokenizer: Any) -> None:
    options: dict[str, Any] = {"layer": LAYER, "store": store, "dtype": "float32", "max_length": 128}

    def tune(model: PreTrainedModel) -> None:
        with torch.no_grad():
            linear_of(model).weight.mul_(1.5)

    for change in (tune, steering_number):
        model = bert()
        with Recycler(model, tokenizer, **options) as recycler:
            batches = iter(recycler.reader(TEXTS, on_missing="compute", batch_size=3, depth=1))
            next(batches)
            change(model)
            with pytest.raises((LowerHalfMismatchError, CanaryError)):
                list(batches)

            def texts(model: PreTrainedModel = model, change: Any = change) -> Iterator[str]:
                yield from (f"more {i}" for i in range(2048))
                change(model)
                yield "the last one"

        model = bert()
        with (
            Recycler(model, tokenizer, **options) as recycler,
            pytest.raises((LowerHalfMismatchError, CanaryError)),
        ):
            recycler.fill(texts(model), progress=False)
    with Recycler(bert(), tokenizer, **options) as recycler:
        recycler.verify(5000)


class _Events:
    """A vocabulary that has no word of the canaries' texts."""

    TEXTS = tuple(" ".join(f"ev{(k * k + 7 * i) % 90}" for k in range(20 + 3 * i)) for i in range(6))

    @staticmethod
    def tokenizer() -> PreTrainedTokenizerFast:
        words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2} | {f"ev{i}": 3 + i for i in range(90)}
        backend = Tokenizer(WordLevel(words, "[UNK]"))
        backend.pre_tokenizer = WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
        )


def test_a_vocabulary_without_the_canaries_words(store: actcache.Store) -> None:
    first, second = llama(), llama()
    for layer in base_model_of(second).layers[:LAYER]:
        layer.self_attn.scaling *= 3
    options: dict[str, Any] = {"layer": LAYER, "store": store, "dtype": "float32"}
    with Recycler(first, _Events.tokenizer(), **options) as recycler:
        recycler.fill(_Events.TEXTS, progress=False)
    with pytest.raises(CanaryError):
        Recycler(second, _Events.tokenizer(), **options)


def test_a_hook_that_looks_for_a_token_of_documents(store: actcache.Store) -> None:
    """Which no canary holds: some of the documents themselves are computed again."""
    options: dict[str, Any] = {"layer": LAYER, "store": store, "dtype": "float32"}
    with Recycler(bert(), word_tokenizer(), **options) as recycler:
        recycler.fill(["ab~cd", "e~~f"], progress=False)
    assert all("~" not in text for text in canary.TEXTS)
    model, token = bert(), word_tokenizer()("~")["input_ids"][0]

    def louder(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == token)[..., None], output * 2, output)

    base_model_of(model).embeddings.word_embeddings.register_forward_hook(louder)
    for way in (Recycler.fill, Recycler.reader):
        with (
            Recycler(model, word_tokenizer(), **options) as recycler,
            pytest.raises(CanaryError, match="hook that looks at tokens"),
        ):
            way(recycler, ["ab~cd", "e~~f"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_columns_and_rows_hide_nothing(dtype: torch.dtype, store: actcache.Store, tokenizer: Any) -> None:
    """As real decoders have them: a column that is large everywhere, a row that is large at the first token."""

    def model_of(change: Callable[[PreTrainedModel], None] | None) -> PreTrainedModel:
        model = llama()
        model.get_input_embeddings().weight.data[:, 5] = 200.0
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.data *= 200 / 6
                module.weight.data[5] = 0
        if change is not None:
            change(model)
        return model.to(dtype)

    def louder(model: PreTrainedModel) -> None:
        for layer in base_model_of(model).layers[:LAYER]:
            layer.mlp.register_forward_hook(lambda module, args, output: output * 1.5)

    options: dict[str, Any] = {"layer": LAYER, "store": store, "max_length": 128}
    with Recycler(model_of(None), tokenizer, **options) as recycler:
        recycler.fill(TEXTS, progress=False)
    eager = model_of(None)
    eager.set_attn_implementation("eager")
    Recycler(eager, tokenizer, **options).close()
    with pytest.raises(CanaryError):
        Recycler(model_of(louder), tokenizer, **options)
    rows = np.ones((40, 8))
    rows[0] = 3000
    assert relative_error(rows, np.where(np.arange(40)[:, None] > 0, rows * 1.3, rows)) > 0.2
    assert relative_error(rows, np.where(np.arange(40)[:, None] == 3, np.nan, rows)) == np.inf


def test_overflow_is_called_so(store: actcache.Store, tokenizer: Any) -> None:
    model = bert().half()
    base_model_of(model).encoder.layer[1].output.LayerNorm.weight.data *= 60000
    with Recycler(model, tokenizer, layer=LAYER, store=store) as recycler:
        with pytest.raises(NonFiniteError, match="in float16"):
            recycler.fill(TEXTS, progress=False)
        assert len(recycler.space) == 0


# --- spaces without canaries ------------------------------------------------------------------------------------------


def test_without_canaries_entries_are_compared(store: actcache.Store, tokenizer: Any, tmp_path: Path) -> None:
    fill(store, bert(), tokenizer)
    [path] = (tmp_path / "store").rglob("canaries.npz")
    path.unlink()
    hooked = bert()
    steering_number(hooked)
    with pytest.raises(CanaryError, match="no canaries"):
        Recycler(hooked, tokenizer, layer=LAYER, store=store, dtype="float32", max_length=128)
    with Recycler(bert(), tokenizer, layer=LAYER, store=store, dtype="float32", max_length=128) as recycler:
        compare(recycler)
        assert not path.exists()
        recycler.fill(TEXTS, progress=False)  # makes them anew
        assert path.exists()
    assert issubclass(CanaryError, ActcacheError)
