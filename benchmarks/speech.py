"""Speed, errors and word times of a running server beside faster-whisper with the same weights, greedy on both sides.

    quartet serve DIR --port 9000 --threads 2 [--quantization int8]
    python -m benchmarks.speech --clips DIR --url http://127.0.0.1:9000 --peer-python ENV/bin/python --peer-model CT2_DIR

CLIPS holds WAV files of 16 kHz and `transcription` (lines of "<s> words </s> (file)"), as Debian's pocketsphinx-testdata
has them. Measured in turns, the best of several: one long recording made of the clips, and eight clips at once (the peer
takes them one by one: it has no batch over files). On a shared machine read the ratios.
"""
from __future__ import annotations

import argparse
import difflib
import json
import re
import subprocess
import tempfile
import time
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import httpx

RATE = 16_000
GAP_S = 0.5
AT_ONCE = 8
PEER = Path(__file__).with_name("speech_peer.py")


class Side(Protocol):
    """Who transcribes: seconds, and texts and words of each file."""

    name: str

    def run(self, files: Sequence[Path], language: str, words: bool = False) -> dict[str, Any]: ...


class Peer:
    """A faster-whisper process."""

    def __init__(self, python: str, model: str, compute_type: str, threads: int) -> None:
        self.name = f"faster-whisper {compute_type}"
        self._process = subprocess.Popen([python, str(PEER), model, compute_type, str(threads)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": str(threads)})
        self._answer()

    def run(self, files: Sequence[Path], language: str, words: bool = False) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"files": [str(f) for f in files], "language": language, "words": words}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the peer has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Server:
    """Our server."""

    name = "ours"

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=600)
        self.model = self._client.get("/v1/models").json()["data"][0]["id"]

    def run(self, files: Sequence[Path], language: str, words: bool = False) -> dict[str, Any]:
        form: dict[str, Any] = {"model": self.model, "language": language}
        if words:
            form |= {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
        start = time.perf_counter()
        with ThreadPoolExecutor(len(files)) as pool:
            answers = list(pool.map(lambda path: self._one(path, form), files))
        return {"seconds": time.perf_counter() - start, "texts": [a["text"] for a in answers],
                "words": [[(w["word"], w["start"], w["end"]) for w in a.get("words") or ()] for a in answers]}

    def _one(self, path: Path, form: dict[str, Any]) -> dict[str, Any]:
        with open(path, "rb") as stream:
            response = self._client.post("/v1/audio/transcriptions", data=form, files={"file": (path.name, stream)})
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer


def words_of(text: str) -> list[str]:
    """Words as they are compared."""
    return re.sub(r"[^a-z ]", " ", text.lower().replace("mr.", "mister").replace("-", " ")).split()


def error_rate(heard: str, spoken: str) -> float:
    """Word error rate: edits per spoken word."""
    h, r = words_of(heard), words_of(spoken)
    row = list(range(len(h) + 1))
    for i, word in enumerate(r, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(h, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1] / max(1, len(r))


def differences(ours: Sequence[Any], theirs: Sequence[Any]) -> list[float]:
    """Seconds between the starts, and between the ends, of the words that both have heard."""
    a, b = (["".join(words_of(word[0])) for word in side] for side in (ours, theirs))
    found = []
    for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            mine, other = ours[block.a + i], theirs[block.b + i]
            found += [abs(mine[1] - other[1]), abs(mine[2] - other[2])]
    return sorted(found)


def read(directory: Path) -> list[tuple[Path, str]]:
    """The clips with what is said in them."""
    spoken = dict(re.findall(r"<s> (.*) </s> \((.*)\)", (directory / "transcription").read_text()))
    return [(path, text) for name, text in (pair[::-1] for pair in spoken.items())
            if (path := directory / f"{name}.wav").is_file()]


def reference(directory: str, clips: Sequence[tuple[Path, str]], language: str) -> list[str]:
    """What transformers' Whisper makes of each clip: float32, greedy."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    extract, tokenizer = WhisperFeatureExtractor.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    asked = {"language": language, "task": "transcribe"} if model.generation_config.is_multilingual else {}
    texts = []
    for path, _ in clips:
        with wave.open(str(path)) as clip:
            sound = np.frombuffer(clip.readframes(clip.getnframes()), "<i2").astype(np.float32) / 32768
        features = extract(sound, sampling_rate=RATE, return_tensors="pt").input_features
        texts.append(tokenizer.batch_decode(model.generate(features, **asked), skip_special_tokens=True)[0].strip())
    return texts


def join(clips: Sequence[tuple[Path, str]], seconds: float, target: Path) -> str:
    """Write the clips one after another, again and again, with short pauses; what is said."""
    said: list[str] = []
    frames = 0
    with wave.open(str(target), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        while frames < seconds * RATE:
            path, text = clips[len(said) % len(clips)]
            with wave.open(str(path)) as clip:
                data = clip.readframes(clip.getnframes()) + bytes(2 * int(GAP_S * RATE))
            out.writeframes(data)
            frames += len(data) // 2
            said.append(text)
    return " ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--transformers", metavar="DIR", help="only compare texts with transformers on this checkpoint")
    parser.add_argument("--peer-python")
    parser.add_argument("--peer-model")
    parser.add_argument("--compute-types", default="int8,float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--language", default="en")
    args = parser.parse_args()
    clips, server = read(args.clips), Server(args.url)
    if args.transformers:
        ours = server.run([path for path, _ in clips], args.language)["texts"]
        for mine, other in zip(ours, reference(args.transformers, clips, args.language), strict=True):
            print("equal:" if mine == other else f"{other!r} there, here:", mine)
        return
    if not (args.peer_python and args.peer_model):
        parser.error("--peer-python and --peer-model, or --transformers, are needed")
    files = [clips[i % len(clips)][0] for i in range(AT_ONCE)]
    peers = [Peer(args.peer_python, args.peer_model, kind, args.threads) for kind in args.compute_types.split(",")]
    sides: list[Side] = [server, *peers]
    for side in sides:                             # what is loaded or compiled at first use is not measured
        side.run(files[:1], args.language)
    with tempfile.TemporaryDirectory() as directory:
        long = Path(directory) / "long.wav"
        said = join(clips, args.seconds, long)
        for name, job, truth in (("eight clips at once", files, None), ("one long recording", [long], said)):
            results: dict[str, list[dict[str, Any]]] = {}
            for _ in range(args.rounds):
                for side in sides:
                    results.setdefault(side.name, []).append(side.run(job, args.language))
            best = {who: min(r["seconds"] for r in runs) for who, runs in results.items()}
            rival = min((who for who in best if who != "ours"), key=best.__getitem__)
            for who, runs in results.items():
                errors = f", word errors {error_rate(runs[0]['texts'][0], truth):.2%}" if truth else ""
                print(f"{name}: {who} {best[who]:.2f} s{errors}", flush=True)
            print(f"{name}: {best[rival] / best['ours']:.2f} times the speed of {rival}", flush=True)
        mine = server.run([long], args.language, words=True)["words"][0]
        apart = differences(mine, peers[0].run([long], args.language, words=True)["words"][0])
        within = sum(seconds <= 0.2 for seconds in apart) / max(1, len(apart))
        print(f"word times: {within:.2%} within 0.2 s of {peers[0].name}, median {apart[len(apart) // 2]:.3f} s, "
              f"at most {apart[-1]:.3f} s")
    for peer in peers:
        peer.close()


if __name__ == "__main__":
    main()
