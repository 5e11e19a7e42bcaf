"""The fused decoder step against the same step made of reference kernels, with every option of the dense families."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine_proc.kernels import DecoderLayer, DecoderModel, Kernels, StepInput, load
from tests.engine_proc.kernel_cases import DTYPES, EMULATED, NATIVE, poisoned, prepared, relative_error

HIDDEN, INNER, VOCAB, POSITIONS, BLOCKS, BLOCK = 48, 80, 101, 400, 40, 16


@pytest.fixture(params=[*NATIVE, *EMULATED], ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    yield from prepared(request.param)


@pytest.fixture(scope="module")
def torch_kernels() -> Kernels:
    return load(level="torch")


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"bias": True},
    "qwen3": {"head_norm": True},
    "gemma2": {
        "post_norms": True, "softcap": 30.0, "windows": (20, 0, 20), "gate": "gelu_tanh", "embedding_multiplier": 6.9,
    },
    "olmo2": {"full_norm": True, "post_norms": True, "pre_norms": False},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 12.0},
    "phi3": {"rotary": 8, "windows": (40, 40, 40)},
    "multi-head, no rotation": {"heads": (3, 3, 16), "rotary": 0},
}


class Weights:
    """Random weights of a three-layer model, from which models on several kernels can be built."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        torch.manual_seed(2)
        self.dtype = dtype
        self.options = options
        self.q_heads, self.kv_heads, self.dim = options.get("heads", (4, 2, 16))
        wide, narrow = self.q_heads * self.dim, self.kv_heads * self.dim
        shapes = [(wide + 2 * narrow, HIDDEN), (HIDDEN, wide), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
        self.linears = [[self.matrix(*shape) for shape in shapes] for _ in range(3)]
        self.biases = [self.vector(wide + 2 * narrow) if options.get("bias") else None for _ in range(3)]
        q_norm, k_norm = (wide, narrow) if options.get("full_norm") else (self.dim, self.dim)
        has_qk = options.get("full_norm") or options.get("head_norm")
        self.qk_norms = [(self.vector(q_norm), self.vector(k_norm)) if has_qk else (None, None) for _ in range(3)]
        self.norms = [[self.vector(HIDDEN) for _ in range(4)] for _ in range(3)]
        self.embedding, self.final_norm = self.matrix(VOCAB, HIDDEN), self.vector(HIDDEN)
        angles = torch.rand(POSITIONS, options.get("rotary", self.dim) // 2) * 6
        self.tables = (angles.cos(), angles.sin()) if angles.numel() else (None, None)

    def matrix(self, rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns) / columns**0.5).to(self.dtype)

    def vector(self, size: int) -> Tensor:
        return (torch.rand(size) + 0.5).to(self.dtype)

    def model(self, kernels: Kernels, stored: str | None = None, cache: torch.dtype | None = None) -> DecoderModel:
        options, layers = self.options, []
        for i in range(3):
            qkv, o, gate_up, down = self.linears[i]
            pre, post = options.get("pre_norms", True), options.get("post_norms")
            shape = (BLOCKS, BLOCK, self.kv_heads, self.dim)
            layers.append(
                DecoderLayer(
                    qkv=kernels.linear(qkv, self.biases[i], dtype=stored),
                    o=kernels.linear(o, dtype=stored),
                    gate_up=kernels.linear(gate_up, dtype=stored, gate=options.get("gate", "silu")),
                    down=kernels.linear(down, dtype=stored),
                    k_cache=poisoned(*shape, dtype=cache or self.dtype),
                    v_cache=poisoned(*shape, dtype=cache or self.dtype),
                    cos=self.tables[0],
                    sin=self.tables[1],
                    input_norm=self.norms[i][0] if pre else None,
                    mlp_norm=self.norms[i][1] if pre else None,
                    attention_post_norm=self.norms[i][2] if post else None,
                    mlp_post_norm=self.norms[i][3] if post else None,
                    q_norm=None if self.qk_norms[i][0] is None else self.qk_norms[i][0].float(),
                    k_norm=None if self.qk_norms[i][1] is None else self.qk_norms[i][1].float(),
                    window=options.get("windows", (0, 0, 0))[i],
                )
            )
        names = ("softcap", "embedding_multiplier", "residual_multiplier")
        return DecoderModel(
            layers=tuple(layers),
            embedding=self.embedding,
            final_norm=self.final_norm,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            eps=1e-5,
            scale=0.3,
            qk_norm_full=bool(options.get("full_norm")),
            **{name: options[name] for name in names if name in options},
        )


class Requests:
    """Sequences of known tokens, each in random blocks of its own."""

    def __init__(self, lengths: list[int]) -> None:
        torch.manual_seed(3)
        self.ids = [torch.randint(0, VOCAB, (n,)).int() for n in lengths]
        order, used = torch.randperm(BLOCKS).int(), 0
        self.tables = torch.full((len(lengths), max(lengths) // BLOCK + 2), -1, dtype=torch.int32)
        for s, n in enumerate(lengths):
            blocks = -(-n // BLOCK)
            self.tables[s, :blocks] = order[used : used + blocks]
            used += blocks

    def step(self, ranges: dict[int, tuple[int, int]]) -> StepInput:
        """Tokens [from, to) of some sequences as one batch; the last row of each is wanted."""
        positions = [torch.arange(a, b) for a, b in ranges.values()]
        starts = torch.tensor([0, *(b - a for a, b in ranges.values())]).cumsum(0).int()
        slots = [self.tables[s].long()[p // BLOCK] * BLOCK + p % BLOCK for s, p in zip(ranges, positions)]
        return StepInput(
            ids=torch.cat([self.ids[s][a:b] for s, (a, b) in ranges.items()]),
            positions=torch.cat(positions).int(),
            slots=torch.cat(slots).int(),
            block_tables=self.tables[list(ranges)],
            query_starts=starts,
            context_lens=torch.tensor([b for _, b in ranges.values()], dtype=torch.int32),
            out_rows=starts[1:] - 1,
        )


STEPS = [{0: (0, 1)}, {0: (1, 70), 1: (0, 33), 2: (0, 5)}, {0: (70, 71), 1: (33, 60), 2: (5, 6), 3: (0, 300)}]
STEPS += [{s: (n, n + 1) for s, n in enumerate((71, 60, 6, 300))}, {3: (301, 302)}]
LENGTHS = [72, 61, 7, 302]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_step_equals_the_layers_in_float32(
    kernels: Kernels, torch_kernels: Kernels, family: str
) -> None:
    weights, requests = Weights(torch.float32, **FAMILIES[family]), Requests(LENGTHS)
    fused, layers = (k.decoder(weights.model(k)) for k in (kernels, torch_kernels))
    for ranges in STEPS:
        step = requests.step(ranges)
        assert relative_error(fused(step), layers(step)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_the_fused_step_stays_near_float32_in_small_types(
    kernels: Kernels, torch_kernels: Kernels, family: str, stored: str
) -> None:
    weights, requests = Weights(torch.bfloat16, **FAMILIES[family]), Requests(LENGTHS)
    exact = Weights(torch.bfloat16, **FAMILIES[family])
    exact.embedding = exact.embedding.float()
    fused = kernels.decoder(weights.model(kernels, stored))
    layers = torch_kernels.decoder(exact.model(torch_kernels, "float32", torch.float32))
    for ranges in STEPS:
        step = requests.step(ranges)
        assert relative_error(fused(step), layers(step)) < (0.02 if stored == "bfloat16" else 0.08)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_a_sequence_does_not_depend_on_chunks_neighbours_or_threads(kernels: Kernels, stored: str) -> None:
    weights, requests = Weights(torch.float32), Requests(LENGTHS)
    cache = torch.float32 if stored == "float32" else torch.bfloat16
    kernels.set_num_threads(1)
    decoder = kernels.decoder(weights.model(kernels, stored, cache))
    expected = decoder(requests.step({0: (0, 71), 3: (0, 301)}))
    for threads in (1, 2):
        kernels.set_num_threads(threads)
        decoder = kernels.decoder(weights.model(kernels, stored, cache))
        for ranges in ({3: (0, 100)}, {0: (0, 13), 1: (0, 60)}, {3: (100, 300), 0: (13, 70)}, {0: (70, 71)}):
            last = decoder(requests.step(ranges))
        assert torch.equal(last[0], expected[0])
        last = decoder(requests.step({3: (300, 301)}))
        assert torch.equal(last[0], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_negative_ids_take_given_embeddings(kernels: Kernels, dtype: torch.dtype) -> None:
    weights, requests = Weights(dtype), Requests(LENGTHS)
    step = requests.step({0: (0, 20)})
    expected = kernels.decoder(weights.model(kernels))(step)
    embeds = weights.embedding[step.ids.long()].float()
    ids = step.ids.clone()
    ids[3:9] = -1
    given = replace(step, ids=ids, embeds=embeds)
    assert torch.equal(kernels.decoder(weights.model(kernels))(given), expected)


def test_an_index_out_of_range_is_refused(kernels: Kernels) -> None:
    decoder, requests = kernels.decoder(Weights(torch.float32).model(kernels)), Requests(LENGTHS)
    for name, value in (("ids", VOCAB), ("ids", -1), ("positions", POSITIONS), ("slots", BLOCKS * BLOCK), ("out_rows", 9)):
        step = requests.step({1: (0, 9)})
        getattr(step, name)[0] = value
        with pytest.raises(IndexError):
            decoder(step)


def test_times_are_taken_by_kind_and_reset(kernels: Kernels) -> None:
    decoder = kernels.decoder(Weights(torch.float32).model(kernels))
    decoder(Requests(LENGTHS).step({3: (0, 300)}))
    times = decoder.take_times()
    assert all(times[kind] > 0 for kind in ("qkv", "attention", "o", "gate_up", "down", "norms", "rope_cache"))
    assert sum(decoder.take_times().values()) == 0


def test_a_nan_stays_in_its_sequence(kernels: Kernels) -> None:
    weights, requests = Weights(torch.float32), Requests(LENGTHS)
    step = requests.step({0: (0, 20), 1: (0, 9)})
    expected = kernels.decoder(weights.model(kernels))(step)
    embeds = torch.zeros(29, HIDDEN)
    embeds[4, 7] = float("nan")
    ids = step.ids.clone()
    ids[4] = -1
    hidden = kernels.decoder(weights.model(kernels))(replace(step, ids=ids, embeds=embeds))
    assert hidden[0].isnan().all() and torch.equal(hidden[1], expected[1])
