"""Which of transformers' models can be cut, where, and are the numbers those of the full model?

    python -m bench.coverage --out coverage.json            # all types; goes on where an earlier run stopped
    python -m bench.coverage --types gpt_neox,vit,whisper

A tiny random model of every type in transformers' mapping is built and cut after layers 1, N/2 and N-1, as users do it:
rows of documents that are recorded alone (``LowerHalf``), a reduced model (``reduce``) that is given them in one padded
batch. Its outputs are compared here with what the full model makes of each document alone. A type is served where all
three cuts are; exact where no number is further off than 1e-5 of the largest. Types run in processes of their own, so
many at a time, each with a limit of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

KINDS = (
    "text decoder",
    "text encoder",
    "encoder of an encoder-decoder",
    "multimodal, fed with text",
    "vision",
    "audio",
)
TOLERANCE = 1e-5
MOST_PARAMETERS = 30_000_000

_WIDTH, _LAYERS, _HEADS = 32, 4, 4
#: What configurations call their sizes. A model is made with those that its configuration has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), 99),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "encoder_hidden_size", "emb_dim"), _WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "decoder_hidden_size", "projection_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth"), _LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("encoder_num_hidden_layers",), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "decoder_num_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("hidden_dim", "mlp_dim", "ffn_hidden_size", "decoder_intermediate_size", "d_inner"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "attention_head_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_hidden_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("num_mel_bins",), 16),
    **dict.fromkeys(("max_source_positions",), 32),
    **dict.fromkeys(("vocab_size_per_layer_input", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("initializer_range",), 0.2),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("eos_token_id",), 2),
}
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_MARK = "coverage of "  # begins a line of a child's output that is a result
_TIMM = ("timm_backbone", "timm_wrapper")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, with commas between; else all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=40, help="types of one process")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of processor time that a type may take")
    parser.add_argument("--out", type=Path, help="JSON: read to go on, written after each chunk")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/models.md has them")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        for model_type in given.types.split(","):
            print(_MARK + json.dumps(_within(given.limit, model_type)), flush=True)
        return
    asked = given.types.split(",") if given.types else all_types()
    found: dict[str, Any] = {}
    if given.out and given.out.exists():
        found = {one["type"]: one for one in json.loads(given.out.read_text())["types"]}
    start = time.monotonic()
    _run_all([one for one in asked if one not in found], given, found)
    results = [found[one] for one in asked if one in found]
    print(summary(results, markdown=given.markdown))
    print(f"{len(results)} types, {time.monotonic() - start:.0f} s")


def _within(seconds: float, model_type: str) -> dict[str, Any]:
    """Examine a type; what takes longer is given up, and refused where it was built in that time."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:g} s of processor time")

    signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return examined(model_type)
    except TimeoutError as error:
        return {"type": model_type, "kind": None, "built": False, "why": str(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def all_types() -> list[str]:
    """Return every model type that has a base model in transformers' mapping."""
    from transformers.models.auto import modeling_auto

    return sorted(set(modeling_auto.MODEL_MAPPING_NAMES) - set(_TIMM))


def _run_all(types: list[str], given: Any, found: dict[str, Any]) -> None:
    waiting = [types[i : i + given.chunk] for i in range(0, len(types), given.chunk)]
    running: list[tuple[subprocess.Popen[str], list[str], float]] = []
    while waiting or running:
        while waiting and len(running) < given.processes:
            chunk = waiting.pop(0)
            command = [sys.executable, "-m", "bench.coverage", "--child", "--types", ",".join(chunk)]
            command += ["--limit", str(given.limit)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            running.append((child, chunk, time.monotonic()))
        child, chunk, _ = running.pop(0)
        try:
            output, _ = child.communicate(timeout=3600)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
        done = [json.loads(line.partition(_MARK)[2]) for line in output.split("\n") if _MARK in line]
        found.update({one["type"]: one for one in done})
        left = [one for one in chunk if one not in found]
        if left:  # the first of them took too long, or took the process with it
            found[left[0]] = {
                "type": left[0],
                "kind": None,
                "built": False,
                "why": "the process ended or took too long",
            }
            if left[1:]:
                waiting.insert(0, left[1:])
        if given.out:
            given.out.write_text(json.dumps({"types": [found[one] for one in sorted(found)]}, indent=1))


def summary(results: list[dict[str, Any]], *, markdown: bool = False) -> str:
    """Return the tables: by kind what runs, is served and is exact; and why what is refused is refused."""
    lines = [
        "",
        "| kind | types that run | served and exact | served, inexact | refused |",
        "| --- | --- | --- | --- | --- |",
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for kind in KINDS:
        ran = [one for one in results if one["kind"] == kind and one["built"]]
        exact = [one for one in ran if one["served"] and one["exact"]]
        inexact = [one for one in ran if one["served"] and not one["exact"]]
        refused = [one for one in ran if not one["served"]]
        share = f"{len(exact)} ({100 * len(exact) / len(ran):.0f} %)" if ran else "0"
        lines.append(f"| {kind} | {len(ran)} | {share} | {len(inexact)} | {len(refused)} |")
        for one in refused:
            reasons[reason_of(one)].append(one["type"])
        for one in inexact:
            reasons["INEXACT"].append(one["type"])
    lines += ["", "| why | types |", "| --- | --- |"]
    lines += [
        f"| {why} | {', '.join(types)} |" for why, types in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    unbuilt = Counter(one["why"][:60] for one in results if not one["built"])
    if not markdown:
        lines += [
            "",
            f"not built or not run: {sum(unbuilt.values())}",
            *(f"  {n} x {why}" for why, n in unbuilt.most_common(12)),
        ]
    return "\n".join(lines)


def reason_of(one: dict[str, Any]) -> str:
    """Return what kind of refusal a message is."""
    text = next((cut["why"] for cut in one["cuts"] if cut.get("why")), one.get("why") or "")
    for words, short in (
        ("change their shape", "pooling between layers"),
        ("times", "layers that are called more than once"),
        ("no list of layers", "no list of layers that take one another's rows"),
        ("does not run on", "does not run on its main input alone"),
        ("no function of a document", "rows depend on the batch or on chance"),
        ("running this", "running the model changes it"),
        ("cannot be replayed", "upper layers need more of the lower half than its rows"),
    ):
        if words in text:
            return short
    return text[:80]


def examined(model_type: str) -> dict[str, Any]:
    """Build one type and try its cuts; return what came of it, as JSON values."""
    import torch
    import transformers

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    start = time.process_time()
    result: dict[str, Any] = {
        "type": model_type,
        "kind": None,
        "built": False,
        "served": False,
        "exact": False,
        "cuts": [],
    }
    for sizes in variants():
        try:
            model = tiny(model_type, sizes)
            result["kind"] = kind_of(model)
            if result["kind"] is None:
                raise ValueError(f"takes {getattr(model, 'main_input_name', None)}")
            documents = inputs_of(model)
            _runs(model, documents)
            break
        except TimeoutError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            result.setdefault("why", what)
    else:
        return result
    result.pop("why", None)
    result["built"] = True
    try:
        result["cuts"] = cuts(model, documents)
    except TimeoutError as error:  # it runs, and counts as refused
        result["cuts"] = [{"layer": None, "why": str(error)}]
    result["served"] = all("why" not in cut for cut in result["cuts"])
    result["exact"] = result["served"] and all(cut["error"] <= TOLERANCE for cut in result["cuts"])
    result["seconds"] = round(time.process_time() - start, 2)
    return result


def variants() -> Iterator[dict[str, Any]]:
    """Yield sizes to try, for configurations in which some do not go together."""
    yield SIZES
    yield {name: value for name, value in SIZES.items() if name not in ("head_dim", *_LATENT)}
    wide = {name: 256 if value == _WIDTH else 2 if value == _HEADS else value for name, value in SIZES.items()}
    yield {name: value for name, value in wide.items() if name not in ("head_dim", "d_kv", "d_head", *_LATENT)}
    few = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    yield {name: SIZES[name] for name in (*few, "intermediate_size", "initializer_range", "pad_token_id")}
    yield {**SIZES, "num_heads": 8, "n_mamba_heads": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8}


def tiny(model_type: str, sizes: dict[str, Any]) -> Any:
    """Return a tiny random model of a type, in eval mode."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = tiny_config(type(AutoConfig.for_model(model_type)), sizes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"has {size / 1e6:.0f} million parameters at tiny sizes")
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():  # no weight is 0, or nothing would be seen through it
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.float()


def tiny_config(cls: Any, sizes: dict[str, Any], depth: int = 0) -> Any:
    """Return a configuration with small sizes, and so its parts."""
    default = cls()
    names = set(vars(default)) | set(getattr(cls, "attribute_map", {}))
    options = {name: value for name, value in sizes.items() if name in names and _alike(vars(default).get(name), value)}
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        there = getattr(default, name, None)
        kind = type(there) if hasattr(there, "to_dict") else part
        if depth < 3 and hasattr(there, "to_dict") and hasattr(kind, "model_type"):
            options[name] = tiny_config(kind, sizes, depth + 1)
    for attempt in (options, {name: value for name, value in options.items() if name != "head_dim"}):
        try:
            return cls(**attempt)
        except Exception:
            continue
    return cls(**{name: value for name, value in options.items() if hasattr(value, "to_dict")})


def _alike(default: Any, value: Any) -> bool:
    return default is None or isinstance(default, int | float)


def kind_of(model: Any) -> str | None:
    """Return which of ``KINDS`` a model is."""
    import inspect

    from transformers.models.auto import modeling_auto as auto

    config = model.config
    model_type = config.model_type
    names = set(inspect.signature(model.forward).parameters)
    other = {"pixel_values", "input_features", "input_values", "audio_values", "bbox", "image"} & names
    if "input_ids" in names:
        if getattr(config, "is_encoder_decoder", False):
            return KINDS[2]
        if other or any(hasattr(config, f"{one}_config") for one in ("vision", "audio")):
            return KINDS[3]
        if (
            model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            and model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        ):
            return KINDS[0]
        return KINDS[1]
    if {"pixel_values", "pixel_values_videos"} & names:
        return KINDS[4]
    if {"input_features", "input_values"} & names:
        return KINDS[5]
    return None


def inputs_of(model: Any) -> list[dict[str, Any]]:
    """Return what is to be recorded: documents of three lengths, or some images or sounds."""
    import torch

    from actcache.models.discovery import encoder_path, small_inputs, some_tokens

    run = model.get_submodule(encoder_path(model))
    small = small_inputs(run)
    if "input_ids" in small:
        return [{"input_ids": torch.from_numpy(ids)[None]} for ids in some_tokens(run, [7, 12, 4, 12], seed=9)]
    generator = torch.Generator().manual_seed(9)
    return [
        {
            name: torch.randn(value[:1].shape, generator=generator) if value.is_floating_point() else value[:1]
            for name, value in small.items()
        }
        for _ in range(2)
    ]


def _runs(model: Any, documents: list[dict[str, Any]]) -> None:
    for one in documents[:2]:
        outputs_of(model, one)


def outputs_of(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a model's floating point outputs that are tensors."""
    import inspect

    import torch

    given = dict(inputs)
    names = inspect.signature(model.forward).parameters
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        given.setdefault("decoder_input_ids", torch.full((next(iter(inputs.values())).shape[0], 3), 5))
    if "use_cache" in names:
        given.setdefault("use_cache", False)
    with torch.no_grad():
        output = model(**given)
    found = {}
    for name, value in output.items():
        several = value if isinstance(value, tuple) and "past" not in name else (value,)
        found |= {f"{name}.{i}": one for i, one in enumerate(several) if isinstance(one, torch.Tensor)}
    return {name: value for name, value in found.items() if value.is_floating_point()}


def cuts(model: Any, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cut a model after layers 1, N/2 and N-1."""
    import logging

    from actcache.errors import ActcacheError
    from actcache.models import family_of

    logging.getLogger("actcache").setLevel(logging.ERROR)
    try:
        count = len(family_of(model).layers_of(model))
    except ActcacheError as error:
        return [{"layer": None, "why": str(error)}]
    alone = [outputs_of(model, one) for one in documents]
    found = []
    for layer in sorted({1, count // 2, count - 1} - {0}):
        cut: dict[str, Any] = {"layer": layer}
        try:
            cut |= _cut(model, documents, alone, layer)
        except ActcacheError as error:
            cut["why"] = str(error)
        found.append(cut)
    return found


def _cut(model: Any, documents: list[dict[str, Any]], alone: list[dict[str, Any]], layer: int) -> dict[str, Any]:
    import torch

    from actcache.models import LowerHalf, family_of, proof, reduce

    lower = LowerHalf(model, family_of(model), layer)
    lower.family = proof.of_rows(lower)
    reduced = reduce(model, layer)
    if "input_ids" not in documents[0]:
        worst = 0.0
        for one, want in zip(documents, alone, strict=True):
            rows = lower.rows_of(one).clone()
            blank = {
                name: torch.zeros_like(value) if value.is_floating_point() else value for name, value in one.items()
            }
            worst = max(worst, _difference(outputs_of(reduced, {"activations": rows, **blank}), want))
        return {"error": worst}
    family = reduced.__dict__["actcache_family"]
    rows = [torch.from_numpy(lower.run([one["input_ids"][0].numpy()])[0]) for one in documents]
    groups = [[i for i, one in enumerate(rows) if len(one) == n] for n in {len(one) for one in rows}]
    worst = 0.0
    for group in groups if family.equal_lengths or lower.family.equal_lengths else [range(len(rows))]:
        longest = max(len(rows[i]) for i in group)
        ids, mask = (
            torch.zeros((len(group), longest), dtype=torch.long),
            torch.zeros((len(group), longest), dtype=torch.long),
        )
        batch = torch.randn(len(group), longest, rows[0].shape[1])
        for place, i in enumerate(group):
            n = len(rows[i])
            batch[place, :n], ids[place, :n], mask[place, :n] = rows[i], documents[i]["input_ids"][0], 1
        got = outputs_of(reduced, {"activations": batch, "token_ids": ids, "attention_mask": mask})
        for place, i in enumerate(group):
            mine = {}
            for name, value in got.items():
                want = alone[i].get(name)
                if want is None or value.shape[0] != len(group) or want.shape[0] != 1:
                    continue
                cut_off = value.ndim > 1 and value.shape[1] == longest and want.shape[1] == len(rows[i])
                mine[name] = value[place : place + 1, : len(rows[i])] if cut_off else value[place : place + 1]
            worst = max(worst, _difference(mine, alone[i]))
    return {"error": worst, "equal_lengths": bool(family.equal_lengths), "keeps": list(family.shared)}


def _difference(got: dict[str, Any], want: dict[str, Any]) -> float:
    """Return the largest difference of any number, by its output's largest; infinite where there is none to compare."""
    both = [name for name in want if name in got and got[name].shape == want[name].shape]
    if not both:
        return float("inf")
    sizes = [float((got[name] - want[name]).abs().max()) / max(1.0, float(want[name].abs().max())) for name in both]
    return float("inf") if any(size != size for size in sizes) else max(sizes)


if __name__ == "__main__":
    main()
