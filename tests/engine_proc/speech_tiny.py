"""Shared by the speech tests: tiny random Whisper and Moonshine checkpoints, and a core driven in one process."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine_proc.speech.core import SpeechCore
from engine_proc.speech.load import load_speech
from pipeline.config import EngineConfig, ModelConfig, ServerConfig
from pipeline.ids import RidMaker
from pipeline.messages import AudioWindow, Failed, Route, SpeechAdd, Transcribed
from pipeline.params import SamplingParams, SpeechParams
from pipeline.transport import Address

SPECIALS = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>",
            "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")
EOT, SOT = 256, 257
FIRST_TIME = EOT + len(SPECIALS)
WIDTH, FRAMES, POSITIONS = 64, 1500, 64
ROUTE = Route(0, 1, 0, 1, 0, 0)


def byte_tokenizer(*specials: str) -> Tokenizer:
    """Every byte is a token; special tokens follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def make_whisper(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A random multilingual Whisper whose texts vary."""
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(
        vocab_size=FIRST_TIME + 1501, num_mel_bins=80, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
        max_source_positions=FRAMES, max_target_positions=POSITIONS, init_std=0.25, decoder_start_token_id=SOT,
        eos_token_id=EOT, bos_token_id=EOT, pad_token_id=EOT, suppress_tokens=None, begin_suppress_tokens=None)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "encoder_attn" in name:
                parameter.mul_(3.0)                            # what is heard has to matter
    model.generation_config = transformers.GenerationConfig(**{
        "decoder_start_token_id": SOT, "eos_token_id": EOT, "bos_token_id": EOT, "pad_token_id": EOT,
        "max_length": POSITIONS, "is_multilingual": True, "lang_to_id": {"<|en|>": SOT + 1, "<|de|>": SOT + 2},
        "task_to_id": {"translate": SOT + 3, "transcribe": SOT + 4}, "prev_sot_token_id": SOT + 5,
        "no_timestamps_token_id": FIRST_TIME - 1, "max_initial_timestamp_index": 50, "return_timestamps": False,
        "suppress_tokens": [5, 6, 7], "begin_suppress_tokens": [3, EOT], "alignment_heads": [[0, 1], [1, 2]], **changes})
    model.save_pretrained(directory)
    byte_tokenizer(*SPECIALS, *(f"<|{i * 0.02:.2f}|>" for i in range(1501))).save(str(directory / "tokenizer.json"))
    (directory / "preprocessor_config.json").write_text(json.dumps(
        {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80}))
    return directory


def make_moonshine(directory: Path, seed: int = 0) -> Path:
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    config = transformers.MoonshineConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4, decoder_num_attention_heads=4, max_position_embeddings=40, initializer_range=0.3,
        decoder_start_token_id=257, bos_token_id=257, eos_token_id=256, pad_token_id=256)
    transformers.MoonshineForConditionalGeneration(config).eval().save_pretrained(directory)
    byte_tokenizer("</s>", "<s>").save(str(directory / "tokenizer.json"))
    (directory / "preprocessor_config.json").write_text(json.dumps(
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False}))
    return directory


def features(seed: int) -> np.ndarray:
    """Made-up log-mel features of a window."""
    return np.random.default_rng(seed).standard_normal((80, 2 * FRAMES)).astype(np.float32)


def samples(seed: int, seconds: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(16_000 * seconds)) * 0.1).astype(np.float32)


class Sender:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, to: Address, message: Any) -> bool:
        self.sent.append(message)
        return True

    def pressure(self, to: Address) -> float:
        return 0.0


class World:
    """One speech core on a real runner, with a clock of its own."""

    def __init__(self, directory: Path, **engine: Any) -> None:
        model = ModelConfig(names=("speech",), path=str(directory), task="transcribe", max_model_len=POSITIONS,
                            engine=EngineConfig(**{"threads": 1, "max_num_seqs": 8, **engine}))
        config = ServerConfig(run_dir="/nowhere", log_dir="/nowhere", models=(model,))
        self.sender, self.now = Sender(), 10**9
        self.runner = load_speech(model, lambda phase, percent: None)
        self.core = SpeechCore(config, 0, 1, self.runner, self.sender, lambda: self.now, CollectorRegistry())
        self._rids = RidMaker(0, 1)

    def add(self, windows: list[np.ndarray], *, done: bytes = b"", only: list[int] | None = None, deadline_ns: int = 0,
            **params: Any) -> int:
        """Submit a recording; the id of it."""
        rid = self._rids.next()
        asked = {"task": "transcribe", "language": "en", "prompt": "", "hotwords": "", "timestamps": False,
                 "words": False, "temperatures": [0.0],
                 "sampling": SamplingParams(temperature=0.0, max_tokens=0, seed=7), **params}
        for index, data in enumerate(windows):
            if only is None or index in only:
                window = AudioWindow(index, index == len(windows) - 1, 30.0 * index, 30.0, data)
                self.core.handle(SpeechAdd(rid, ROUTE, SpeechParams(**asked), window, done, deadline_ns))
        return rid

    def run(self, turns: int = 10_000) -> None:
        """Turn until nothing is left to do, checking every table."""
        while turns and self.core.has_work():
            self.core.turn()
            self.core.assert_invariants()
            turns -= 1

    def results(self, rid: int) -> dict[int, Transcribed]:
        return {m.index: m for m in self.sender.sent if isinstance(m, Transcribed) and m.rid == rid}

    def failures(self) -> list[tuple[int, str]]:
        return [(item.rid, item.code) for m in self.sender.sent if isinstance(m, Failed) for item in m.items]

    def refusals(self) -> list[tuple[int, str]]:
        """What has failed once what waits is handed over."""
        self.core.turn()
        return self.failures()

    def at_rest(self) -> bool:
        """Whether nothing is held for anybody."""
        core = self.core
        return (not core.requests and not core.waiting and not core.scheduler.running and not core.scheduler.waiting
                and self.runner.num_free == self.runner.num_slots and core.scheduler.pool.num_used == 0)


def ids_of(result: Transcribed) -> list[int]:
    return [i for segment in result.segments for i in np.frombuffer(segment.ids, "<u4").tolist()]
