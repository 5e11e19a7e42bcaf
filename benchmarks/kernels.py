"""Times each CPU kernel beside torch's own, at the shapes of SmolLM2-135M.

    python -m benchmarks.kernels [--threads N] [--quick] [--level avx2] [--only linear,attention]

Each line: milliseconds of ours and of torch (the best of several runs, both sides in turn), the ratio, and what ours
reaches in GB/s of weights or cache and in GFLOP/s. Weights of all layers are touched in turn, so that they come from
memory as in a decode step. On a shared machine read the ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine_proc.kernels import DecoderLayer, DecoderModel, Kernels, PackedLinear, StepInput, load, reference

HIDDEN, INNER, VOCAB, LAYERS = 576, 1536, 49152, 30
Q_HEADS, KV_HEADS, DIM = 9, 3, 64
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line: two callables that do the same work, and that work in bytes and operations."""

    name: str
    ours: Callable[[], object]
    torchs: Callable[[], object]
    gbytes: float
    gflop: float


def best_of(case: Case, seconds: float) -> tuple[float, float]:
    """Milliseconds of ours and of torch's, alternating until the time is up; the first round warms."""
    times: tuple[list[float], list[float]] = ([], [])
    deadline = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < deadline:
        for call, taken in zip((case.ours, case.torchs), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append((time.perf_counter() - start) * 1e3)
    return min(times[0][1:]), min(times[1][1:])


def report(case: Case, seconds: float) -> None:
    ours, torchs = best_of(case, seconds)
    print(
        f"{case.name:<44}{ours:10.3f}{torchs:10.3f}{torchs / ours:8.2f}x"
        f"{case.gbytes / ours * 1e3:9.1f}{case.gflop / ours * 1e3:9.0f}",
        flush=True,
    )


def weights(rows: int, columns: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return (torch.rand(rows, columns) * 0.1 - 0.05).to(dtype)


def linear_cases(kernels: Kernels, rows: list[int], stored: str, layers: int) -> list[Case]:
    dtype = torch.float32 if stored == "float32" else BF16
    shapes = [((Q_HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
    plain = [[weights(n, k, dtype) for n, k in shapes] for _ in range(layers)]
    packed = [[kernels.linear(w, dtype=stored) for w in layer] for layer in plain]  # type: ignore[arg-type]
    count = layers * sum(n * k for n, k in shapes)
    cases = []
    for t in rows:
        x = {k: torch.randn(t, k).to(dtype) for k in (HIDDEN, INNER)}
        out = {n: torch.empty(t, n, dtype=dtype) for n, _ in shapes}

        def ours(x: dict = x, out: dict = out) -> None:
            for layer in packed:
                for linear in layer:
                    linear(x[linear.k], out[linear.n])

        def torchs(x: dict = x) -> None:
            for layer in plain:
                for weight in layer:
                    F.linear(x[weight.shape[1]], weight)

        nbytes = sum(linear.nbytes for layer in packed for linear in layer)
        name = f"{layers} layers' linears {stored}, {t} rows"
        cases.append(Case(name=name, ours=ours, torchs=torchs, gbytes=nbytes / 1e9, gflop=2 * t * count / 1e9))
    return cases


def head_cases(kernels: Kernels, rows: list[int], stored: str) -> list[Case]:
    dtype = torch.float32 if stored == "float32" else BF16
    weight = weights(VOCAB, HIDDEN, dtype)
    head = kernels.linear(weight, dtype=stored)  # type: ignore[arg-type]
    cases = []
    for t in rows:
        x, out = torch.randn(t, HIDDEN).to(dtype), torch.empty(t, VOCAB)
        cases.append(
            Case(
                name=f"LM head {stored}, {t} rows, float32 logits",
                ours=lambda x=x, out=out: head(x, out),
                torchs=lambda x=x: F.linear(x, weight).float(),
                gbytes=head.nbytes / 1e9,
                gflop=2 * t * VOCAB * HIDDEN / 1e9,
            )
        )
    return cases


def attention_cases(kernels: Kernels, batches: list[tuple[int, int, int]]) -> list[Case]:
    cases = []
    for sequences, new, context in batches:
        per = -(-context // 16)
        caches = [torch.randn(sequences * per, 16, KV_HEADS, DIM).to(BF16) for _ in range(2)]
        tables = torch.randperm(sequences * per).int().view(sequences, per)
        starts = torch.arange(0, (sequences + 1) * new, new).int()
        lens = torch.full((sequences,), context, dtype=torch.int32)
        q = torch.randn(sequences * new, Q_HEADS, DIM).to(BF16)
        out = torch.empty_like(q)
        # torch gets its keys and values already gathered: the comparison flatters it
        heads = q.view(sequences, new, Q_HEADS, DIM).transpose(1, 2)
        keys, values = (
            cache[tables.flatten().long()].view(sequences, per * 16, KV_HEADS, DIM)[:, :context].transpose(1, 2)
            for cache in caches
        )
        mask = torch.ones(new, context, dtype=torch.bool).tril(context - new)
        pairs = sequences * new * (context - (new - 1) / 2)
        cases.append(
            Case(
                name=f"attention, {sequences} x {new} new of {context}",
                ours=lambda a=(q, *caches, tables, starts, lens), o=out: kernels.attention(*a, scale=0.125, out=o),
                torchs=lambda h=heads, k=keys, v=values, m=mask: F.scaled_dot_product_attention(
                    h, k, v, attn_mask=m, scale=0.125, enable_gqa=True
                ),
                gbytes=2 * sequences * context * KV_HEADS * DIM * 2 / 1e9,
                gflop=4 * pairs * Q_HEADS * DIM / 1e9,
            )
        )
    return cases


def small_cases(kernels: Kernels, rows: list[int]) -> list[Case]:
    cases = []
    width = (Q_HEADS + 2 * KV_HEADS) * DIM
    for t in rows:
        qkv = torch.randn(t, width).to(BF16)
        q, k, v = qkv.split([Q_HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=1)
        angles = torch.rand(2048, DIM // 2)
        cos, sin, positions = angles.cos(), angles.sin(), torch.arange(t).int()
        caches = [torch.zeros(t // 16 + 1, 16, KV_HEADS, DIM, dtype=BF16) for _ in range(2)]
        rotary = (q, k, v, cos, sin, positions, *caches, positions)
        logits = torch.randn(min(t, 32), VOCAB)

        def line(name: str, ours: Callable[[], object], torchs: Callable[[], object], elements: int) -> Case:
            return Case(name=name, ours=ours, torchs=torchs, gbytes=2 * elements / 1e9, gflop=0.0)

        cases += [
            line(
                f"rotary + cache write, {t} rows",
                lambda a=rotary: kernels.rope_cache(*a),
                lambda a=rotary: reference.rope_cache(*a),
                2 * t * width,
            ),
            line(
                f"argmax, {len(logits)} rows",
                lambda g=logits: kernels.argmax(g),
                lambda g=logits: g.argmax(dim=-1),
                2 * len(logits) * VOCAB,
            ),
        ]
    return cases


def decoder_cases(kernels: Kernels, batches: list[tuple[int, int, int]], stored: str, layers: int) -> list[Case]:
    """A whole step up to the head, against the same layers made of torch operations."""
    steps = [decoder_step(*batch) for batch in batches]
    blocks = max(int(step.block_tables.max()) for step in steps) + 1
    fused = kernels.decoder(decoder_model(kernels, stored, layers, blocks))
    plain_kernels = load(level="torch")
    plain = plain_kernels.decoder(decoder_model(plain_kernels, None, layers, blocks))
    width = (2 * Q_HEADS + 2 * KV_HEADS) * DIM  # qkv and o
    body = layers * HIDDEN * (3 * INNER + width)
    cases = []
    for (sequences, new, context), step in zip(batches, steps, strict=True):
        cases.append(
            Case(
                name=f"step {stored}, {sequences} x {new} new of {context}",
                ours=lambda s=step: fused(s),
                torchs=lambda s=step: plain(s),
                gbytes=body * (1 if stored == "int8" else 2) / 1e9,
                gflop=2 * sequences * new * body / 1e9,
            )
        )
    return cases


def decoder_step(sequences: int, new: int, context: int) -> StepInput:
    per = -(-context // 16)
    tables = torch.randperm(sequences * per).int().view(sequences, per)
    positions = torch.arange(context - new, context).repeat(sequences)
    starts = torch.arange(0, (sequences + 1) * new, new).int()
    rows = torch.arange(sequences).repeat_interleave(new)
    return StepInput(
        ids=torch.randint(0, VOCAB, (sequences * new,)).int(),
        positions=positions.int(),
        slots=(tables[rows, positions // 16] * 16 + positions % 16).int(),
        block_tables=tables,
        query_starts=starts,
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        out_rows=starts[1:] - 1,
    )


def decoder_model(kernels: Kernels, stored: str | None, layers: int, blocks: int) -> DecoderModel:
    angles = torch.rand(4096, DIM // 2)
    norm = torch.ones(HIDDEN, dtype=BF16)
    width = (Q_HEADS + 2 * KV_HEADS) * DIM

    def linear(rows: int, columns: int, gate: str | None = None) -> PackedLinear:
        return kernels.linear(weights(rows, columns), dtype=stored, gate=gate)  # type: ignore[arg-type]

    def layer() -> DecoderLayer:
        shape = (blocks, 16, KV_HEADS, DIM)
        return DecoderLayer(
            qkv=linear(width, HIDDEN),
            o=linear(HIDDEN, HIDDEN),
            gate_up=linear(2 * INNER, HIDDEN, "silu"),
            down=linear(HIDDEN, INNER),
            k_cache=kernels.empty(shape, BF16).fill_(0.1),
            v_cache=kernels.empty(shape, BF16).fill_(0.1),
            cos=angles.cos(),
            sin=angles.sin(),
            input_norm=norm,
            mlp_norm=norm,
        )

    return DecoderModel(
        layers=tuple(layer() for _ in range(layers)),
        embedding=weights(VOCAB, HIDDEN),
        final_norm=norm,
        q_heads=Q_HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        eps=1e-5,
        scale=0.125,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--level", help="instruction set (engine_proc/kernels/isa.py)")
    parser.add_argument("--quick", action="store_true", help="fewer layers, rows and runs")
    parser.add_argument("--only", default="linear,int8,head,attention,small,step", help="groups, float32 is another")
    options = parser.parse_args()
    kernels = load(level=options.level)
    torch.set_num_threads(options.threads)
    kernels.set_num_threads(options.threads)
    seconds, layers = (0.15, 6) if options.quick else (0.5, LAYERS)
    rows = [1, 8, 32] if options.quick else [1, 2, 4, 8, 16, 32, 64, 256, 512]
    print(f"{kernels.describe()}; torch {torch.__version__}")
    print(f"{'':<44}{'ours ms':>10}{'torch ms':>10}{'ratio':>9}{'GB/s':>9}{'GFLOP/s':>9}")
    groups: dict[str, Callable[[], list[Case]]] = {
        "linear": lambda: linear_cases(kernels, rows, "bfloat16", layers),
        "int8": lambda: linear_cases(kernels, rows, "int8", layers),
        "float32": lambda: linear_cases(kernels, rows, "float32", layers // 3),
        "head": lambda: head_cases(kernels, [1, 8, 32], "bfloat16") + head_cases(kernels, [1, 8, 32], "int8"),
        "attention": lambda: attention_cases(
            kernels, [(1, 1, 300), (8, 1, 300), (32, 1, 300), (1, 1, 4000), (1, 200, 200), (2, 256, 2000)]
        ),
        "step": lambda: [
            case
            for stored in ("bfloat16", "int8")
            for case in decoder_cases(
                kernels, [(1, 1, 300), (8, 1, 300), (32, 1, 300), (1, 201, 201)], stored, layers
            )
        ],
        "small": lambda: small_cases(kernels, [1, 32, 512]),
    }
    for name in options.only.split(","):
        for case in groups[name]():
            report(case, seconds)


if __name__ == "__main__":
    main()
