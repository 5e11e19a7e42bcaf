"""Transcribes with faster-whisper in an environment of its own: commands as JSON lines in, times and texts out.

Started by benchmarks.speech with the peer's Python; imports nothing of ours.

    PYTHON speech_peer.py MODEL_DIRECTORY COMPUTE_TYPE THREADS
"""
from __future__ import annotations

import json
import sys
import time

from faster_whisper import WhisperModel


def main() -> None:
    directory, compute_type, threads = sys.argv[1:4]
    model = WhisperModel(directory, device="cpu", compute_type=compute_type, cpu_threads=int(threads))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        start, texts, words = time.perf_counter(), [], []
        for path in job["files"]:
            segments, _ = model.transcribe(path, beam_size=1, language=job["language"], word_timestamps=job["words"])
            found = list(segments)
            texts.append("".join(segment.text for segment in found))
            words.append([(w.word, w.start, w.end) for s in found for w in s.words or ()])
        print(json.dumps({"seconds": time.perf_counter() - start, "texts": texts, "words": words}), flush=True)


if __name__ == "__main__":
    main()
