"""The table of families: what differs between the transformers that can be split.

Read off the modeling code of transformers 5.23, which ``tests/models/test_families.py`` watches for new configuration
fields. Importing this module fills the table.
"""

from __future__ import annotations

from actcache.models.family import BERT_CONFIG, Family, register_family

register_family(Family("bert", ("bert",)))  # MiniLM and SciBERT, too

register_family(
    Family(
        "roberta",
        ("roberta", "xlm-roberta", "camembert"),
        # pad_token_id: positions are counted from it, over the tokens that are not it
        numeric_config={**BERT_CONFIG, "pad_token_id": None},
        padding_shifts_positions=True,
    )
)

register_family(
    Family(
        "electra",
        ("electra",),
        embeddings=("embeddings", "embeddings_project?"),  # where embeddings are narrower than layers
        numeric_config={**BERT_CONFIG, "embedding_size": None},
    )
)

register_family(
    Family(
        "distilbert",
        ("distilbert",),
        layers="transformer.layer",
        numeric_config={
            "dim": None,
            "n_heads": None,
            "hidden_dim": None,
            "activation": None,
            "max_position_embeddings": None,
            "sinusoidal_pos_embds": False,
            "is_causal": None,
        },
    )
)

register_family(
    Family(
        "mpnet",
        ("mpnet",),
        numeric_config={**BERT_CONFIG, "relative_attention_num_buckets": None},
        first_position=2,  # after its padding_idx, which is 1 whatever the configuration says
        tuple_arity=2,
        shared=("encoder.relative_attention_bias",),
    )
)

_DEBERTA_CONFIG = {
    **BERT_CONFIG,
    "embedding_size": None,
    "relative_attention": False,
    "max_relative_positions": -1,
    "pos_att_type": None,
    "position_biased_input": True,
}

register_family(
    Family(
        "deberta",
        ("deberta",),
        numeric_config={**_DEBERTA_CONFIG, "talking_head": False},
        tuple_arity=2,
        shared=("encoder.rel_embeddings?",),
        matrix_readers=("lm_predictions",),
    )
)

register_family(
    Family(
        "deberta-v2",
        ("deberta-v2",),
        numeric_config={
            **_DEBERTA_CONFIG,
            "attention_head_size": None,
            "position_buckets": -1,
            "share_att_key": False,
            "norm_rel_ebd": "none",
            "conv_kernel_size": 0,
            "conv_groups": 1,
            "conv_act": "tanh",
        },
        tuple_arity=2,
        shared=("encoder.rel_embeddings?", "encoder.LayerNorm?"),
        convolution="encoder.conv?",
        matrix_readers=("lm_predictions",),
    )
)

register_family(
    Family(
        "modernbert",
        ("modernbert",),
        layers="layers",
        numeric_config={
            "hidden_size": None,
            "num_attention_heads": None,
            "head_dim": None,
            "intermediate_size": None,
            "hidden_activation": None,
            "norm_eps": None,
            "norm_bias": False,
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": None,
            "layer_types": None,
            "local_attention": None,
            "rope_parameters": None,
            "is_causal": None,
        },
        positions_in_layers=True,
    )
)

register_family(
    Family(
        "t5",
        ("t5", "mt5"),
        layers="encoder.block",
        embeddings=("encoder.embed_tokens",),
        numeric_config={
            "d_model": None,
            "d_kv": None,
            "d_ff": None,
            "num_heads": None,
            "relative_attention_num_buckets": None,
            "relative_attention_max_distance": 128,
            "layer_norm_epsilon": None,
            "dense_act_fn": None,
            "is_gated_act": False,
            "is_decoder": False,
            "is_causal": None,
        },
        tuple_arity=3,
        relative_bias="layer.0.SelfAttention",
        stack="encoder",
        dtype="bfloat16",
    )
)

register_family(
    Family(
        "gpt2",
        ("gpt2",),
        layers="h",
        embeddings=("wte", "wpe"),
        numeric_config={
            "n_embd": None,
            "n_head": None,
            "n_inner": None,
            "n_positions": None,
            "activation_function": None,
            "layer_norm_epsilon": None,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            "is_causal": None,
        },
    )
)

_LLAMA_CONFIG = {
    "hidden_size": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    "hidden_act": None,
    "rms_norm_eps": None,
    "attention_bias": False,
    "max_position_embeddings": None,
    "rope_parameters": None,
    "is_causal": None,
}
_SLIDING_CONFIG = {"layer_types": None, "sliding_window": None}
_GEMMA_CONFIG = {**_LLAMA_CONFIG, "use_bidirectional_attention": None}
_GEMMA2_CONFIG = {
    **{name: absent for name, absent in _GEMMA_CONFIG.items() if name != "hidden_act"},
    **_SLIDING_CONFIG,
    "hidden_activation": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
}

for _name, _model_type, _config in (
    ("llama", "llama", {**_LLAMA_CONFIG, "mlp_bias": False}),
    ("qwen2", "qwen2", {**_LLAMA_CONFIG, **_SLIDING_CONFIG}),
    ("qwen3", "qwen3", {**_LLAMA_CONFIG, **_SLIDING_CONFIG}),
    ("gemma", "gemma", _GEMMA_CONFIG),
    ("gemma2", "gemma2", _GEMMA2_CONFIG),
    ("gemma3", "gemma3_text", _GEMMA2_CONFIG),
):
    register_family(
        Family(
            _name,
            (_model_type,),
            layers="layers",
            embeddings=("embed_tokens",),
            numeric_config=_config,
            positions_in_layers=True,
            dtype="bfloat16",
        )
    )
