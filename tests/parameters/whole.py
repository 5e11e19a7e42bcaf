"""The whole server without HTTP, in one process: bodies in, answers and streamed chunks out.

The real schema, request table, tokenizer, engine with a tiny random model, detokenizer and formatting, joined by the
transport of the simulation. `Whole.kill` lets a stage die in the middle of an answer.
"""
from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from detok_proc.worker import Vocabs
from engine_proc.core import EngineCore
from engine_proc.runner import ModelRunner
from frontend import generate
from frontend.generate import Job
from frontend.request import Request
from pipeline.config import EngineConfig, HttpConfig, ModelConfig, ServerConfig
from pipeline.messages import Kind
from tests.engine_proc.tiny import load, make_checkpoint
from tests.simulation.world import Links, Process, World

CORPUS = ["the quick brown fox jumps over the lazy dog and the other dog does not mind it ", "hello there world "] * 8
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|fim_prefix|>", "<|fim_suffix|>",
           "<|fim_middle|>")
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
IDENTITY = {"id": "id", "created": 1, "system_fingerprint": "fp"}


def make_model(directory: Path) -> Path:
    """A random Llama of 320 ids with a byte-level tokenizer that has all kinds of special tokens."""
    make_checkpoint(directory, "llama", num_hidden_layers=2)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    return directory


class Whole(World):
    """One of each stage."""

    def __init__(self, directory: Path, *, model: dict[str, Any] | None = None, engine: dict[str, Any] | None = None,
                 http: dict[str, Any] | None = None, **server: Any) -> None:
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        settings = {"num_kv_blocks": 400, "block_size": 16, "threads": 1, "max_num_seqs": 16, **(engine or {})}
        one = ModelConfig(**{
            "names": ("tiny",), "path": str(directory), "max_model_len": 256, "vocab_size": 320,
            "eos_ids": (self.id("</s>"),), "engine": EngineConfig(**settings), **(model or {})})
        config = ServerConfig(run_dir="", log_dir="", models=(one,), http=HttpConfig(**(http or {})), **server)
        self._load: Callable[[], ModelRunner] = lambda: load(directory, one.max_model_len, **settings)
        super().__init__(config, Vocabs(config), random.Random(0))

    def id(self, token: str) -> int:
        number = self.tokenizer.token_to_id(token)
        assert number is not None, token
        return int(number)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int], special: bool = False) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special))

    @property
    def letters(self) -> list[int]:
        """Ids of single letters: what they make is text."""
        return [self.encode(char)[0] for char in "abcdefghijklmnopqrstuvwxyz"]

    def start(self, process: Process) -> None:
        if process[0] is not Kind.ENGINE:
            super().start(process)
            return
        epoch = self.epochs[process] = self.epochs.get(process, 0) + 1
        self.stages[process] = EngineCore(self.config, 0, epoch, self._load(), Links(self, process), lambda: self.now)

    def reconfigured(self, **http: Any) -> None:
        """Other settings of the frontend, for the requests from here on."""
        self.config = replace(self.config, http=replace(self.config.http, **http))

    # ---- requests ------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Everybody moves once."""
        for key in list(self.links):
            while self.links[key]:
                self.deliver(key)
        for process in self.members:
            self.turn(process)
        self.now += 1_000_000

    def open(self, kind: str, body: dict[str, Any]) -> tuple[Job, Request]:    # type: ignore[override]
        job = generate.JOBS[kind](json.dumps({"model": "tiny", **body}).encode(), self.config)
        job.ask.spec.deadline_ns = 0                        # the clock here is no real one
        return job, self.stages[Kind.FRONTEND, 0][0].open(job.ask.spec, lambda: None)

    def ask(self, kind: str, kill: tuple[Kind, int] | None = None, **body: Any) -> dict[str, Any]:
        """The plain answer. `kill`: a stage that dies, and after how many moves."""
        job, request = self.open(kind, body)
        self._run(request, lambda: None, kill)
        answer = job.body(job.ask, request, IDENTITY)
        json.dumps(answer, allow_nan=False)
        self._close(request)
        return answer

    def stream(self, kind: str, kill: tuple[Kind, int] | None = None, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a complete streamed answer."""
        job, request = self.open(kind, {"stream": True, **body})
        events, data = job.chunks(job.ask, request, IDENTITY), bytearray()

        def read() -> None:
            data.extend(events.events(request.take()))
        self._run(request, read, kill)
        read()
        data += events.end()
        self._close(request)
        lines = [line.removeprefix("data: ") for line in data.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def complete(self, prompt: Any = "hello there", **body: Any) -> dict[str, Any]:
        """A greedy completion of eight tokens, unless told otherwise."""
        return self.ask("completions", **{"prompt": prompt, "max_tokens": 8, "temperature": 0, **body})

    def chat(self, **body: Any) -> dict[str, Any]:
        return self.ask("chat", **{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8,
                                   "temperature": 0, **body})

    def text(self, **body: Any) -> str:
        return str(self.complete(**body)["choices"][0]["text"])

    def ids(self, **body: Any) -> list[int]:
        """The output ids of a completion."""
        return list(self.complete(return_token_ids=True, **body)["choices"][0]["token_ids"])

    def _run(self, request: Request, read: Callable[[], None], kill: tuple[Kind, int] | None) -> None:
        for move in range(3000):
            if request.done:
                break
            if kill is not None and move == kill[1]:
                self.kill((kill[0], 0))
                for process in self.members:
                    self.tell(process)
            self.pump()
            read()
        if request.error is not None:
            error = request.error
            self._close(request)
            raise error
        assert request.done

    def _close(self, request: Request) -> None:
        self.stages[Kind.FRONTEND, 0][0].close(request)
        for _ in range(5):
            self.pump()
        assert self.empty() and not len(self.stages[Kind.FRONTEND, 0][0]), self.sizes()
        self.check()
