"""OPT: LayerNorm, learned positions, a plain MLP, biases everywhere. Its wiring is `opt_decoder`."""

from __future__ import annotations

from ..config_file import ConfigFile
from .config import ModelConfig, read_activation


def read_opt(file: ConfigFile) -> ModelConfig:
    if not file.flag("layer_norm_elementwise_affine", default=True):
        raise file.wrong("layer_norm_elementwise_affine", "true or absent: norms without weights are not supported")
    if file.flag("_remove_final_layer_norm"):
        raise file.wrong("_remove_final_layer_norm", "false or absent: such checkpoints are not supported")
    hidden_size, num_heads = file.integer("hidden_size"), file.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise file.wrong("num_attention_heads", f"a divisor of hidden_size ({hidden_size})")
    embedding_size = file.integer("word_embed_proj_dim", hidden_size)
    bias = file.flag("enable_bias", default=True)
    return ModelConfig(
        family="opt",
        num_layers=file.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=file.integer("ffn_dim"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=file.integer("vocab_size"),
        max_position_embeddings=file.integer("max_position_embeddings", 2048),
        norm_eps=1e-5,
        rope=None,
        attention_scale=(hidden_size // num_heads) ** -0.5,
        activation=read_activation(file, "activation_function", "relu", "gelu"),
        tied_embeddings=file.flag("tie_word_embeddings", default=True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_first=file.flag("do_layer_norm_before", default=True),
        embedding_size=None if embedding_size == hidden_size else embedding_size,
    )
