"""Shared by the model tests: tiny random checkpoints of each family, the reference by transformers, and a driver.

The weights are drawn wide enough that greedy texts vary and near-ties hardly occur; norms and biases are random too, so
that a forgotten offset, scale or bias shows. The driver runs real sequences through the real scheduler and runner.
"""
from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Ids
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from engine_proc.blocks import BlockPool
from engine_proc.loader import load_runner
from engine_proc.plan import ItemResult
from engine_proc.request import Sequence
from engine_proc.runner import ModelRunner
from engine_proc.scheduler import Scheduler
from pipeline.config import EngineConfig, ModelConfig
from pipeline.messages import Finish, Logprobs, Route
from pipeline.params import DetokSpec, SamplingParams

VOCAB = 320
LONGEST = 256
ROUTE = Route(tokenizer=0, tokenizer_epoch=1, engine=0, engine_epoch=1, detok=0, detok_epoch=1)
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LONGEST, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "attention_dropout": 0.0}


def make_checkpoint(directory: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32,
                    **config: Any) -> Path:
    """Write a random checkpoint of `family` with `config` over the tiny dimensions.

    Small embeddings: in Gemma they are scaled and tied, and would drown what the layers add.
    """
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    settings = transformers.AutoConfig.for_model(family, **{**BASE, **config})
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.get_input_embeddings().weight.mul_(0.1 if family.startswith("gemma") else 1.0)
    model.to(dtype).save_pretrained(directory)
    return directory


class Reference:
    """What transformers itself computes with the same weights."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager").eval()
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)    # no end of sequence

    @torch.inference_mode()
    def greedy(self, prompt: Ids[int], count: int) -> list[int]:
        out = self.model.generate(
            torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=count)
        return out[0, len(prompt):].tolist()

    def clear(self, lengths: Iterable[int], count: int, seed: int = 1) -> list[tuple[list[int], list[int]]]:
        """(prompt, greedy ids) for each length, without near-ties that rounding could decide."""
        chosen = []
        for number, length in enumerate(lengths):
            for attempt in range(20):
                (prompt,) = prompts([length], seed=1000 * seed + 20 * number + attempt)
                ids = self.greedy(prompt, count)
                best = self.logprobs(prompt + ids)[length - 1:-1].topk(2).values
                if float((best[:, 0] - best[:, 1]).min()) > 1e-4:
                    break
            else:
                raise AssertionError("every candidate has a near-tie")
            chosen.append((prompt, ids))
        return chosen

    @torch.inference_mode()
    def logprobs(self, ids: Ids[int]) -> torch.Tensor:
        """float32 [len(ids), vocab]: of the token after each."""
        return torch.log_softmax(self.model(torch.tensor([list(ids)]), use_cache=False).logits[0].float(), dim=-1)


def load(directory: Path, max_model_len: int = LONGEST, **engine: Any) -> ModelRunner:
    settings = {"num_kv_blocks": 200, "block_size": 16, "threads": 1, **engine}
    return load_runner(
        ModelConfig(names=("tiny",), path=str(directory), max_model_len=max_model_len, engine=EngineConfig(**settings)),
        lambda phase, percent: None)


def prompts(lengths: Iterable[int], seed: int = 1, vocab: int = VOCAB) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, vocab) for _ in range(length)] for length in lengths]


def sequence(rid: int, prompt: Ids[int], max_tokens: int = 16, history: Ids[int] = (), choice: int = 0,
             stops: Iterable[int] = (), **sampling: Any) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling})
    return Sequence(
        rid=rid << 8, route=ROUTE, choice=choice, tokens=array("I", [*prompt, *history]), num_prompt=len(prompt),
        num_history=len(history), sampling=params, detok=DetokSpec(), max_total=len(prompt) + max_tokens,
        stops=frozenset(stops), arrival=rid)


class Driver:
    """Runs sequences to their end, as the engine's loop does, and keeps what came with each token."""

    def __init__(self, runner: ModelRunner, **engine: Any) -> None:
        settings = {"block_size": runner.block_size, "num_kv_blocks": runner.num_blocks, **engine}
        self.runner, self.config = runner, EngineConfig(**settings)
        self.pool = BlockPool(self.config.num_kv_blocks or 0, runner.block_size, self.config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config, self.pool, runner.admit, runner.release)
        self.results: dict[int, list[ItemResult]] = {}
        self.steps = 0

    def run(self, *seqs: Sequence, preempt_at: int = -1) -> list[list[int]]:
        """The output ids of each sequence. `preempt_at`: the newest running one loses its blocks in that step."""
        for seq in seqs:
            self.scheduler.add(seq)
        while any(not seq.finish for seq in seqs):
            if self.steps == preempt_at:
                self.scheduler.preempt(self.scheduler.running[-1])
            plan = self.scheduler.plan()
            assert plan is not None, "sequences wait and nothing can be planned"
            for seq, result in self.scheduler.collect(plan, self.runner.collect(self.runner.launch(plan))):
                self.results.setdefault(seq.rid, []).append(result)
            self.scheduler.reap()
            self.scheduler.assert_invariants()
            self.runner.slots.assert_invariants(self.scheduler.running)
            self.steps += 1
        return [list(seq.tokens[seq.num_prompt:]) for seq in seqs]

    def errors(self, seq: Sequence) -> str | None:
        return seq.error.code if seq.finish is Finish.ERROR and seq.error else None

    def sampled_logprobs(self, seq: Sequence) -> list[Logprobs]:
        return [result.logprobs for result in self.results[seq.rid] if result.logprobs is not None]


def floats(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.float32)


def uints(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint32)
