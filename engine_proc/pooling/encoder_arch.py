"""Describes an encoder of the BERT family by data: dimensions, norms, positions, windows, and where its weights are.

`describe` turns a config.json into an `EncoderArch` through a table of families. Used by the pooling loader; no torch
here. A model that no row fits raises `Unfit`, and the loader hands it to transformers' own modeling code.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine_proc.rope import Config, Rope, Unfit, read_rope

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "relu": "relu", "silu": "silu", "swish": "silu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What differs from layer to layer."""

    window: int = 0                     # tokens to either side that a token sees; 0: all
    rope: int | None = None             # index into EncoderArch.ropes
    attn_norm: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderArch:
    """A bidirectional transformer. `names` maps roles to weight names; what has no name is not there.

    `{n}` in a name is the layer's number.
    """

    family: str
    hidden: int
    heads: int
    mlp: int
    vocab: int
    layers: tuple[Layer, ...]
    names: dict[str, str]
    embedding_width: int
    eps: float = 1e-12
    prenorm: bool = False               # norms ahead of attention and MLP, and one at the end (ModernBERT)
    norm_bias: bool = True
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    activation: str = "gelu"
    gated: bool = False
    num_type_ids: int = 1
    positions: int = 0                  # rows of the table of positions; 0: none
    first_position: int = 0             # row of the first token (RoBERTa: behind that of padding)
    pad_id: int = -1                    # tokens with this id take the row first_position - 1; -1: no such rule
    ropes: tuple[Rope, ...] = ()
    bias_buckets: int = 0               # relative attention bias (MPNet)
    max_positions: int = 0              # tokens of the longest input

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family differs from BERT: names of its configuration's keys, fixed traits, weight names."""

    keys: dict[str, str] = field(default_factory=dict)
    traits: Config = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    refine: Callable[[Config], Config] | None = None


KEYS = {"hidden": "hidden_size", "heads": "num_attention_heads", "mlp": "intermediate_size", "vocab": "vocab_size",
        "layers": "num_hidden_layers", "eps": "layer_norm_eps", "activation": "hidden_act"}
DEFAULTS = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
            "type_vocab_size": 2, "dim": 768, "n_heads": 12, "n_layers": 6, "hidden_dim": 3072, "activation": "gelu",
            "norm_eps": 1e-5, "hidden_activation": "gelu"}
EMBEDDINGS = {"word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings",
              "embed_norm": "embeddings.LayerNorm"}
LAYER = "encoder.layer.{n}."
BERT = {**EMBEDDINGS, "type": "embeddings.token_type_embeddings", "q": LAYER + "attention.self.query",
        "k": LAYER + "attention.self.key", "v": LAYER + "attention.self.value", "o": LAYER + "attention.output.dense",
        "attn_norm": LAYER + "attention.output.LayerNorm", "up": LAYER + "intermediate.dense",
        "down": LAYER + "output.dense", "mlp_norm": LAYER + "output.LayerNorm"}
MPNET = {**{role: name for role, name in BERT.items() if role != "type"}, "q": LAYER + "attention.attn.q",
         "k": LAYER + "attention.attn.k", "v": LAYER + "attention.attn.v", "o": LAYER + "attention.attn.o",
         "attn_norm": LAYER + "attention.LayerNorm", "bias": "encoder.relative_attention_bias"}
DISTILBERT = {**EMBEDDINGS, **{role: "transformer.layer.{n}." + name for role, name in (
    ("q", "attention.q_lin"), ("k", "attention.k_lin"), ("v", "attention.v_lin"), ("o", "attention.out_lin"),
    ("attn_norm", "sa_layer_norm"), ("up", "ffn.lin1"), ("down", "ffn.lin2"), ("mlp_norm", "output_layer_norm"))}}
MODERNBERT = {"word": "embeddings.tok_embeddings", "embed_norm": "embeddings.norm", "final_norm": "final_norm",
              "qkv": "layers.{n}.attn.Wqkv", "o": "layers.{n}.attn.Wo", "attn_norm": "layers.{n}.attn_norm",
              "gate_up": "layers.{n}.mlp.Wi", "down": "layers.{n}.mlp.Wo", "mlp_norm": "layers.{n}.mlp_norm"}
NOMIC = {"word": "embeddings.word_embeddings", "type": "embeddings.token_type_embeddings", "embed_norm": "emb_ln",
         **{role: "encoder.layers.{n}." + name for role, name in (
             ("qkv", "attn.Wqkv"), ("o", "attn.out_proj"), ("attn_norm", "norm1"), ("gate", "mlp.fc12"),
             ("up", "mlp.fc11"), ("down", "mlp.fc2"), ("mlp_norm", "norm2"))}}


def _absolute(config: Config) -> Config:
    """Learned positions from 0 on, as BERT and DistilBERT have them."""
    _refuse(config.get("position_embedding_type", "absolute") != "absolute", "relative positions")
    return {"positions": int(config["max_position_embeddings"]), "max_positions": int(config["max_position_embeddings"])}


def _behind_padding(config: Config) -> Config:
    """Positions that begin behind the row of padding (RoBERTa, MPNet)."""
    pad = config.get("pad_token_id")
    pad = 1 if pad is None else int(pad)
    positions = _absolute(config)["positions"]
    return {"positions": positions, "first_position": pad + 1, "pad_id": pad, "max_positions": positions - pad - 1}


def _mpnet(config: Config) -> Config:
    return {**_behind_padding(config), "num_type_ids": 1,
            "bias_buckets": int(config.get("relative_attention_num_buckets") or 32)}


def _modernbert(config: Config) -> Config:
    count = int(config.get("num_hidden_layers", 22))
    every = int(config.get("global_attn_every_n_layers") or 3)
    types = config.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(count)]
    window = int(config.get("local_attention") or 128) // 2
    head_dim = int(config.get("hidden_size", 768)) // int(config.get("num_attention_heads", 12))
    params = config.get("rope_parameters") or {}
    ropes = tuple(read_rope(config, params.get(kind) or {}, float((params.get(kind) or {}).get("rope_theta") or old),
                            head_dim)
                  for kind, old in (("full_attention", config.get("global_rope_theta") or 160_000.0),
                                    ("sliding_attention", config.get("local_rope_theta") or 10_000.0)))
    biases = {"qkv_bias": bool(config.get("attention_bias")), "o_bias": bool(config.get("attention_bias")),
              "mlp_bias": bool(config.get("mlp_bias")), "norm_bias": bool(config.get("norm_bias"))}
    return {**biases, "ropes": ropes, "max_positions": int(config["max_position_embeddings"]), "layers": tuple(
        Layer(window=0 if kind == "full_attention" else window, rope=0 if kind == "full_attention" else 1,
              attn_norm=number > 0) for number, kind in enumerate(types))}


def _nomic(config: Config) -> Config:
    """transformers' form of the configuration, or that of the original checkpoints, which spell it as GPT-2 does."""
    original = "n_embd" in config
    if original:
        for wrong, what in (
                (config.get("activation_function") != "swiglu", "an activation other than SwiGLU"),
                (config.get("prenorm"), "norms ahead of the layers"), (config.get("use_rms_norm"), "RMSNorm"),
                (config.get("rotary_emb_fraction", 1.0) != 1.0, "partly rotated heads"),
                (config.get("rotary_emb_interleaved"), "interleaved rotation"),
                (config.get("rotary_scaling_factor"), "scaled rotation"),
                (config.get("num_experts", 0) > 1 or config.get("moe_every_n_layers", 0) > 0, "experts"),
                (config.get("qkv_proj_bias") or config.get("mlp_fc1_bias") or config.get("mlp_fc2_bias"), "biases")):
            _refuse(bool(wrong), what)
        config = {**config, "hidden_size": config["n_embd"], "num_attention_heads": config["n_head"],
                  "max_position_embeddings": config.get("max_trained_positions") or config["n_positions"]}
    params = config.get("rope_parameters") or {}
    theta = float(params.get("rope_theta") or config.get("rotary_emb_base") or 1000.0)
    head_dim = int(config["hidden_size"]) // int(config["num_attention_heads"])
    changes: Config = {"ropes": (read_rope(config, params, theta, head_dim),),
                       "max_positions": int(config["max_position_embeddings"])}
    if original:
        changes |= {"hidden": config["n_embd"], "heads": config["n_head"], "mlp": config["n_inner"],
                    "layers": config["n_layer"], "eps": config.get("layer_norm_epsilon", 1e-12), "activation": "silu",
                    "num_type_ids": int(config.get("type_vocab_size") or 1)}
    return changes


PLAIN = {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "gated": True}
BEHIND = Family(names=BERT, refine=_behind_padding)
FAMILIES = {
    "bert": Family(names=BERT, refine=_absolute),
    "electra": Family(names={**BERT, "embed_projection": "embeddings_project"}, refine=_absolute),
    "roberta": BEHIND, "xlm-roberta": BEHIND, "camembert": BEHIND,
    "mpnet": Family(names=MPNET, refine=_mpnet),
    "distilbert": Family(names=DISTILBERT, refine=_absolute, traits={"num_type_ids": 1, "eps": 1e-12}, keys={
        "hidden": "dim", "heads": "n_heads", "mlp": "hidden_dim", "layers": "n_layers", "activation": "activation"}),
    "modernbert": Family(names=MODERNBERT, refine=_modernbert, traits={**PLAIN, "prenorm": True, "num_type_ids": 1},
                         keys={"eps": "norm_eps", "activation": "hidden_activation"}),
    "nomic_bert": Family(names=NOMIC, refine=_nomic, traits=PLAIN),
}


def _refuse(wrong: bool, what: str) -> None:
    if wrong:
        raise Unfit(what)


def describe(config: Config) -> EncoderArch:
    """The arch of a config.json; Unfit when there is none."""
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise Unfit(f"the architecture '{config['model_type']}'")
    _refuse(bool(config.get("is_decoder") or config.get("add_cross_attention")), "a decoder")
    config = {**DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    values: Config = {role: config[key] for role, key in {**KEYS, **family.keys}.items()}
    values["num_type_ids"] = int(config["type_vocab_size"])
    values |= {**family.traits, **(family.refine(config) if family.refine else {})}
    activation = ACTIVATIONS.get(values["activation"])
    if activation is None:
        raise Unfit(f"the activation '{values['activation']}'")
    if isinstance(values["layers"], int):
        rope = 0 if values.get("ropes") else None
        values["layers"] = tuple(Layer(rope=rope) for _ in range(values["layers"]))
    _refuse(values["hidden"] % values["heads"] != 0, "heads of an odd size")
    width, names = values["hidden"], dict(family.names)
    if "embed_projection" in names:
        width = int(config.get("embedding_size") or width)
        if width == values["hidden"]:
            del names["embed_projection"]
    return EncoderArch(family=config["model_type"], names=names, embedding_width=width,
                       **{**values, "activation": activation})
