"""Describes a dense decoder by data: dimensions, norms, rope, windows, multipliers, and where its weights are.

`describe` turns a config.json (transformers 4.x or 5.x form) into an `Arch` through a table of families; there is no
class per family. Used by the engine's loader; no torch here. A model that no row of the table fits raises `Unfit`,
and the loader hands it to transformers' own modeling code.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine_proc.rope import Config, Rope, Unfit, read_rope

ATTENTION_SLOWER = 1.6                  # than products with packed weights, for as many multiplications (CPU, measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What differs from layer to layer."""

    window: int | None = None           # attends to this many last positions, itself included
    rope: int | None = 0                # index into Arch.ropes; None: no positions at all (NoPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A dense decoder-only transformer. `names` maps roles to weight names; a norm without a name is not there."""

    family: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    names: dict[str, str]
    tied: bool
    norm: str = "rms"                   # rms | layer
    norm_eps: float = 1e-6
    norm_offset: float = 0.0            # added to the norms' weights (Gemma: 1)
    qk_norm: str | None = None          # None | head: over each head | full: over all heads together
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"            # silu | gelu_tanh | gelu
    gated: bool = True
    attn_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    given_scale: float = 1.0                 # of embeddings that a request brings, which are what transformers takes
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    max_positions: int = 0              # what the model was made for

    @property
    def context_cost(self) -> float:
        """What it costs a prompt token to attend to one token more, in units of all its other products: 1/1900 for
        SmolLM2-135M, 1/17000 for a Llama of 8 billion weights. Layers with a window are left out."""
        wide = sum(layer.window is None for layer in self.layers)
        inner = (3 if self.gated else 2) * self.mlp
        weights = len(self.layers) * self.hidden * ((2 * self.heads + 2 * self.kv_heads) * self.head_dim + inner)
        return ATTENTION_SLOWER * wide * 2 * self.heads * self.head_dim / weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family differs from Llama: defaults of its configuration class, fixed traits, weight names."""

    defaults: Config = field(default_factory=dict)
    traits: Config = field(default_factory=dict)            # fields of Arch that its code fixes
    names: dict[str, str | None] = field(default_factory=dict)   # None: not there
    types: Callable[[Config], list[str]] | None = None      # attention type of each layer
    refine: Callable[[Config], Config] | None = None        # fields of Arch that its configuration sets


DEFAULTS: Config = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
                    "tie_word_embeddings": False, "max_position_embeddings": 2048}
NAMES = {                       # of a layer's parts below the layer; embed and norm below the decoder
    "embed": "embed_tokens", "norm": "norm", "head": "lm_head",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}
QK_NORMS: dict[str, str | None] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
SANDWICH: dict[str, str | None] = {
    "attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm"}
POST_ONLY: dict[str, str | None] = {**SANDWICH, "attn_norm": None, "mlp_norm": None}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
               "gelu_fast": "gelu_tanh", "gelu": "gelu"}
SLIDING, FULL = "sliding_attention", "full_attention"


def _all_sliding(config: Config) -> list[str]:
    return [SLIDING] * config["num_hidden_layers"]


def _late_sliding(config: Config) -> list[str]:
    """Qwen: the layers from max_window_layers on, and only when switched on."""
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else config["num_hidden_layers"]
    return [SLIDING if i >= first else FULL for i in range(config["num_hidden_layers"])]


def _every(n: int) -> Callable[[Config], list[str]]:
    """Every n-th layer attends to everything (`sliding_window_pattern` overrides n)."""
    def types(config: Config) -> list[str]:
        period = config.get("sliding_window_pattern") or n
        return [SLIDING if (i + 1) % period else FULL for i in range(config["num_hidden_layers"])]
    return types


def _nope_sliding(config: Config) -> list[str]:
    """SmolLM3: where it slides at all, the layers without positions do."""
    sliding = config.get("use_sliding_window") and config.get("sliding_window")
    return [SLIDING if sliding and not rope else FULL for rope in _rope_layers(config)]


def _rope_layers(config: Config) -> list[int]:
    """1 for each layer that rotates, 0 for NoPE."""
    period = config.get("no_rope_layer_interval", 4)
    layers = config.get("no_rope_layers")
    return list(layers) if layers else [int((i + 1) % period != 0) for i in range(config["num_hidden_layers"])]


def _attention_bias(config: Config) -> Config:
    return {"qkv_bias": bool(config["attention_bias"]), "o_bias": bool(config["attention_bias"])}


def _llama_biases(config: Config) -> Config:
    return {**_attention_bias(config), "mlp_bias": bool(config["mlp_bias"])}


def _gemma(config: Config) -> Config:
    return {**_attention_bias(config), "embed_scale": float(config["hidden_size"]) ** 0.5}


def _gemma_scalars(config: Config) -> Config:
    return {**_gemma(config), "attn_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
            "attn_softcap": config.get("attn_logit_softcapping"),
            "logit_softcap": config.get("final_logit_softcapping")}


def _granite(config: Config) -> Config:
    return {**_llama_biases(config), "embed_scale": float(config["embedding_multiplier"]),
            "given_scale": float(config["embedding_multiplier"]),
            "residual_scale": float(config["residual_multiplier"]), "attn_scale": float(config["attention_multiplier"]),
            "logit_divisor": float(config["logits_scaling"])}


def _starcoder2(config: Config) -> Config:
    bias = bool(config["use_bias"])
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bias, "norm_eps": float(config["norm_epsilon"])}


GEMMA: Config = {"head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}

# model_type -> what differs. The defaults are those of transformers' configuration classes, for keys that a file omits.
FAMILIES: dict[str, Family] = {
    "llama": Family(refine=_llama_biases),
    "mistral": Family(defaults={"sliding_window": 4096, "num_key_value_heads": 8}, types=_all_sliding),
    "qwen2": Family(defaults={"sliding_window": 4096}, traits={"qkv_bias": True}, types=_late_sliding),
    "qwen3": Family(defaults={"sliding_window": 4096, "head_dim": 128}, traits={"qk_norm": "head"}, names=QK_NORMS,
                    types=_late_sliding, refine=_attention_bias),
    "gemma": Family(defaults=GEMMA, traits={"norm_offset": 1.0}, refine=_gemma),
    "gemma2": Family(defaults={**GEMMA, "sliding_window": 4096, "query_pre_attn_scalar": 256,
                               "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
                     traits={"norm_offset": 1.0}, names=SANDWICH, types=_every(2), refine=_gemma_scalars),
    "gemma3_text": Family(defaults={**GEMMA, "sliding_window": 4096, "query_pre_attn_scalar": 256,
                                    "rope_theta": 1e6, "rope_local_base_freq": 10000.0},
                          traits={"norm_offset": 1.0, "qk_norm": "head"}, names={**SANDWICH, **QK_NORMS},
                          types=_every(6), refine=_gemma_scalars),
    "phi3": Family(defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}, types=_all_sliding,
                   names={"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}),
    "smollm3": Family(defaults={"rope_theta": 2e6, "tie_word_embeddings": True, "num_key_value_heads": 4},
                      types=_nope_sliding, refine=_llama_biases),
    "granite": Family(defaults={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
                                "logits_scaling": 1.0}, refine=_granite),
    "olmo2": Family(defaults={"rms_norm_eps": 1e-5}, traits={"qk_norm": "full"}, names={**POST_ONLY, **QK_NORMS},
                    refine=_attention_bias),
    "olmo3": Family(defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500000.0},
                    traits={"qk_norm": "full"}, names={**POST_ONLY, **QK_NORMS}, types=_every(4),
                    refine=_attention_bias),
    "starcoder2": Family(defaults={"use_bias": True, "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh",
                                   "num_key_value_heads": 2, "tie_word_embeddings": True},
                         traits={"norm": "layer", "gated": False}, types=_all_sliding, refine=_starcoder2,
                         names={"up": "mlp.c_fc", "down": "mlp.c_proj", "gate": None}),
}


def describe(config: Config) -> Arch:
    """The architecture of a config.json; of a multimodal model, that of its language model.

    Unfit when no description fits; KeyError never leaves here.
    """
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("model_type") in FAMILIES:
        tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
        config = {**tied, **text}
    name = config["model_type"]
    family = FAMILIES.get(name)
    if family is None:
        raise Unfit(f"no description of model type '{name}'")
    given = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    full = {**DEFAULTS, **family.defaults, **given}
    try:
        return _build(name, family, full)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError, AttributeError) as error:
        raise Unfit(f"the configuration does not read as '{name}' ({type(error).__name__}: {error})") from None


def _build(name: str, family: Family, config: Config) -> Arch:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    count = int(config["num_hidden_layers"])
    act = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if name.startswith("gemma") and act == "gelu":
        act = "gelu_pytorch_tanh"      # the original Gemma files say "gelu" and mean the approximation
    if act not in ACTIVATIONS:
        raise Unfit(f"no activation '{act}'")
    if config.get("use_bidirectional_attention"):
        raise Unfit("bidirectional attention")
    types = config.get("layer_types") or (family.types(config) if family.types else [FULL] * count)
    if len(types) != count or not set(types) <= {SLIDING, FULL}:
        raise Unfit(f"layer types {sorted(set(types))}")
    if config.get("use_sliding_window") is False:
        config = {**config, "sliding_window": None}
    window = config.get("sliding_window") if family.types else None
    ropes, index = _ropes(config, types, head_dim)
    rotates = _rope_layers(config) if name == "smollm3" else [1] * count
    layers = tuple(
        Layer(window=int(window) if kind == SLIDING and window else None, rope=index[kind] if rotate else None)
        for kind, rotate in zip(types, rotates, strict=True))
    names = {role: where for role, where in {**NAMES, **family.names}.items() if where is not None}
    traits = {"norm_eps": float(config["rms_norm_eps"]), "attn_scale": head_dim ** -0.5, **family.traits,
              **(family.refine(config) if family.refine else {})}
    return Arch(
        family=name, hidden=int(config["hidden_size"]), heads=heads, head_dim=head_dim,
        kv_heads=int(config.get("num_key_value_heads") or heads), mlp=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]), layers=layers, ropes=ropes, names=names, activation=ACTIVATIONS[act],
        tied=bool(config["tie_word_embeddings"]), max_positions=int(config["max_position_embeddings"]), **traits)


def _ropes(config: Config, types: list[str], head_dim: int) -> tuple[tuple[Rope, ...], dict[str, int]]:
    """The distinct ropes, and which one each attention type uses."""
    new = config.get("rope_parameters") or {}
    index: dict[str, int] = {}
    ropes: list[Rope] = []
    for kind in dict.fromkeys(types):
        nested = new.get(kind) if isinstance(new.get(kind), dict) else None
        params = dict(nested if nested is not None else new or config.get("rope_scaling") or {})
        theta = config["rope_theta"]
        if kind == SLIDING and nested is None and "rope_local_base_freq" in config:
            params, theta = {}, config["rope_local_base_freq"]      # Gemma 3, 4.x form: local layers are never scaled
        if kind == SLIDING and nested is None and config["model_type"] == "olmo3":
            params = {"rope_theta": params.get("rope_theta", theta)}
        rope = read_rope(config, params, float(params.get("rope_theta") or theta), head_dim)
        if rope not in ropes:
            ropes.append(rope)
        index[kind] = ropes.index(rope)
    return tuple(ropes), index
