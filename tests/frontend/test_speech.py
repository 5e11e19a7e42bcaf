"""/v1/audio/transcriptions and /v1/audio/translations over real sockets: forms, answers, events, limits, refusals."""
from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from pipeline.beacon import Heard
from pipeline.config import AudioConfig, ModelConfig
from pipeline.messages import Kind
from tests.frontend.served import Served, served
from tests.frontend.test_http import assert_error, client
from tests.frontend.world import beacon

MODELS = (ModelConfig(names=("whisper", "whisper-1"), path="/", task="transcribe", max_model_len=448),
          ModelConfig(names=("chatter",), path="/", vocab_size=1000, max_model_len=256))
FACTS = {"languages": ["de", "en"], "translates": True, "timestamps": True, "words": True, "prompts": True}
SPOKEN = "Hello there./How are you?|I am fine."
TEXT = "Hello there. How are you? I am fine."


@asynccontextmanager
async def speaking(tmp_path: Path, facts: dict[str, Any] = FACTS, **changes: Any) -> AsyncIterator[Served]:
    async with served(models=MODELS, run_dir=str(tmp_path), **changes) as server:
        server.latest[Kind.ENGINE, 0] = Heard(
            beacon(Kind.ENGINE, 0, facts_json=json.dumps(facts).encode()), server.latest[Kind.ENGINE, 0].at_ns)
        yield server
        await server.idle()
        assert not list(tmp_path.glob("spool.*/*")), "a spool file is left"


async def post(server: Served, content: str | bytes = SPOKEN, task: str = "transcriptions", **fields: Any) -> httpx.Response:
    async with client(server) as http:
        data = content.encode() if isinstance(content, str) else content
        return await http.post(f"/v1/audio/{task}", data={"model": "whisper", **fields}, files={"file": ("a.wav", data)})


def refused(response: httpx.Response, status: int, param: str | None = None) -> None:
    """An OpenAI-shaped error with this status, about this parameter."""
    assert_error(response, status, response.json()["error"]["code"], response.json()["error"]["param"])
    assert param is None or response.json()["error"]["param"] == param


async def test_json_is_the_default_and_counts_seconds(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        response = await post(server)
    assert response.json() == {"text": TEXT, "usage": {"type": "duration", "seconds": 18}}


async def test_text_is_plain_text(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        response = await post(server, response_format="text")
    assert response.headers["content-type"].startswith("text/plain") and response.text == TEXT + "\n"


async def test_verbose_json_has_true_values(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        answer = (await post(server, response_format="verbose_json", language="de")).json()
    assert (answer["task"], answer["language"], answer["duration"], answer["text"]) == ("transcribe", "de", 17.5, TEXT)
    assert [(s["id"], s["seek"], s["start"], s["end"]) for s in answer["segments"]] == [
        (0, 0, 0.0, 2.5), (1, 0, 2.5, 5.0), (2, 1000, 10.0, 12.5)]
    assert answer["segments"][0] == {
        "id": 0, "seek": 0, "start": 0.0, "end": 2.5, "text": " Hello there.", "tokens": [5, 6], "temperature": 0.0,
        "avg_logprob": -0.25, "compression_ratio": 1.5, "no_speech_prob": 0.125}
    assert answer["words"] is None


@pytest.mark.parametrize("field", ["timestamp_granularities[]", "timestamp_granularities"])
async def test_words_have_times_where_they_are_asked_for(tmp_path: Path, field: str) -> None:
    async with speaking(tmp_path) as server:
        words = (await post(server, response_format="verbose_json", **{field: "word"})).json()
        both = (await post(server, response_format="verbose_json", **{field: ["word", "segment"]})).json()
    assert words["segments"] is None and both["segments"] and both["words"] == words["words"]
    assert words["words"][1] == {"word": "there.", "start": 0.25, "end": 0.5, "probability": 0.5}


async def test_subtitles(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        srt = (await post(server, "One/two --> three", response_format="srt")).text
        vtt = (await post(server, "One", response_format="vtt")).text
    assert srt == "1\n00:00:00,000 --> 00:00:02,500\nOne\n\n2\n00:00:02,500 --> 00:00:05,000\ntwo -> three\n\n"
    assert vtt == "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nOne\n\n"


async def test_a_translation(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        answer = await post(server, task="translations", to_language="en", language="de")
        assert answer.json() == {"text": TEXT}
        sent = server.pipeline.recordings[0].params
        timed = await post(server, task="translations", response_format="verbose_json",
                           **{"timestamp_granularities[]": "word"})
    assert (sent.task, sent.language) == ("translate", "de") and timed.json()["words"]


async def test_what_is_asked_for_reaches_the_engine(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        await post(server, prompt="as before", hotwords="Quartet", temperature="0.4", top_p="0.5", top_k="3", min_p="0.1",
                   seed="7", frequency_penalty="0.5", presence_penalty="0.25", repetition_penalty="1.5",
                   max_completion_tokens="9", language="EN")
        params = server.pipeline.recordings[0].params
    assert (params.prompt, params.hotwords, params.language) == ("as before", "Quartet", "en")
    assert params.temperatures == [0.4, 0.6, 0.8, 1.0]
    s = params.sampling
    assert (s.top_p, s.top_k, s.min_p, s.seed, s.max_tokens) == (0.5, 3, 0.1, 7, 9)
    assert (s.frequency_penalty, s.presence_penalty, s.repetition_penalty) == (0.5, 0.25, 1.5)


async def test_events_are_of_openai_and_of_vllm_at_once(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        response = await post(server, stream="true", stream_include_usage="true")
    *events, done = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    *deltas, last, usage = map(json.loads, events)
    assert [d["type"] for d in deltas] == ["transcript.text.delta"] * len(deltas)
    assert "".join(d["delta"] for d in deltas) == TEXT == "".join(d["choices"][0]["delta"]["content"] for d in deltas)
    assert (last["type"], last["text"], last["choices"][0]["finish_reason"]) == ("transcript.text.done", TEXT, "stop")
    assert usage["choices"] == [] and usage["usage"] == {
        "prompt_tokens": 875, "completion_tokens": 14, "total_tokens": 889}
    assert {d["object"] for d in deltas} == {"transcription.chunk"}


async def test_usage_goes_along_with_every_event_where_asked(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        response = await post(server, stream="true", stream_include_usage="true", stream_continuous_usage_stats="true")
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert [e["usage"]["completion_tokens"] for e in events] == [7, 14, 14, 14]


async def test_windows_are_streamed_in_order_as_they_come(tmp_path: Path) -> None:
    """The second window is there first; nothing of it is shown before the first one."""
    async with speaking(tmp_path) as server:
        server.pipeline.manual = True
        task = asyncio.create_task(post(server, "one|two", stream="true"))
        while not server.pipeline.recordings:
            await asyncio.sleep(0.01)
        assert server.pipeline.step()
        await asyncio.sleep(0.05)
        assert not task.done()
        server.pipeline.run()
        assert [json.loads(line[6:])["delta"] for line in (await task).text.splitlines() if '"delta":"' in line] == [
            "one", " two"]


async def test_the_openai_client_reads_every_form(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as api:
            create = api.audio.transcriptions.create
            file = ("a.wav", SPOKEN.encode())
            assert (await create(model="whisper-1", file=file)).text == TEXT
            assert (await create(model="whisper-1", file=file, response_format="srt")).startswith("1\n00:")
            assert (await create(model="whisper-1", file=file, response_format="text")) == TEXT + "\n"
            verbose = await create(model="whisper-1", file=file, response_format="verbose_json",
                                   timestamp_granularities=["word", "segment"])
            assert verbose.words and verbose.segments and verbose.duration == 17.5
            events = [event async for event in await create(model="whisper-1", file=file, stream=True)]
            assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == TEXT
            assert events[-1].type == "transcript.text.done" and events[-1].text == TEXT
            assert (await api.audio.translations.create(model="whisper-1", file=file)).text == TEXT


@pytest.mark.parametrize(("fields", "param"), [
    ({"language": "xx"}, "language"), ({"language": "x"}, "language"),
    ({"response_format": "diarized_json"}, "response_format"),
    ({"temperature": "2"}, "temperature"), ({"temperature": "warm"}, "temperature"), ({"top_p": "0"}, "top_p"),
    ({"stream": "true", "response_format": "srt"}, "response_format"), ({"stream": "maybe"}, "stream"),
    ({"stream_include_usage": "true"}, "stream_include_usage"), ({"to_language": "fr"}, "to_language"),
    ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
    ({"timestamp_granularities[]": "letter", "response_format": "verbose_json"}, "timestamp_granularities[0]"),
    ({"use_beam_search": "true"}, "use_beam_search"), ({"n": "2"}, "n"), ({"include[]": "logprobs"}, "include"),
    ({"chunking_strategy": '{"type": "server_vad"}'}, "chunking_strategy"), ({"watermarking": "true"}, "watermarking"),
    ({"vllm_xargs": '{"a": 1}'}, "vllm_xargs"), ({"length_penalty": "2"}, "length_penalty"),
    ({"include_stop_str_in_output": "true"}, "include_stop_str_in_output"),
    ({"known_speaker_names": "x"}, "known_speaker_names"),
    ({"model": "chatter"}, "model")])
async def test_what_cannot_be_done_is_refused_by_name_and_costs_nothing(
        tmp_path: Path, fields: dict[str, str], param: str) -> None:
    async with speaking(tmp_path) as server:
        refused(await post(server, **fields), 400, param=param)
        assert not server.pipeline.recordings


async def test_a_model_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    facts = {"languages": [], "translates": False, "timestamps": False, "words": False, "prompts": False}
    async with speaking(tmp_path, facts) as server:
        refused(await post(server, task="translations"), 400, param="model")
        refused(await post(server, response_format="srt"), 400, param="response_format")
        refused(await post(server, prompt="x"), 400, param="prompt")
        refused(await post(server, hotwords="x"), 400, param="hotwords")
        refused(await post(server, language="de"), 400, param="language")
        assert (await post(server, language="en")).status_code == 200


async def test_an_unknown_model_is_404_and_a_bad_file_400(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        refused(await post(server, model="nobody"), 404, param="model")
        refused(await post(server, "fail"), 400, param="file")
        refused(await post(server, ""), 400, param="file")


async def test_a_server_without_a_speech_model_says_so() -> None:
    async with served() as server:
        refused(await post(server), 404)


async def test_uploads_are_bounded_while_they_come(tmp_path: Path) -> None:
    async with speaking(tmp_path, audio=AudioConfig(max_bytes=1000)) as server:
        refused(await post(server, "x" * 1001), 413, param="file")
        refused(await post(server, "x" * 10**6), 413)
        assert (await post(server, "x" * 1000)).status_code == 200

        async def endless() -> AsyncIterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            while True:
                yield b"x" * 65536
        async with client(server) as http:
            with contextlib.suppress(httpx.WriteError, httpx.ReadError):      # reset while it still sends
                refused(await http.post("/v1/audio/transcriptions", content=endless(),
                                        headers={"content-type": "multipart/form-data; boundary=b"}), 413)
        assert len(server.pipeline.recordings) == 1


PART = b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
FILE = PART % (b"file", b'; filename="a"', b"hi")


@pytest.mark.parametrize("body", [
    b"", b"nonsense", b"--b--\r\n", FILE, FILE + b"--b", PART % (b"model", b"", b"whisper") + b"--b--\r\n",
    PART % (b"file", b"", b"hi") + b"--b--\r\n", FILE + FILE + b"--b--\r\n",
    PART % (b"other", b'; filename="a"', b"hi") + b"--b--\r\n", FILE + PART % (b"model", b"", b"\xff") + b"--b--\r\n",
    FILE + PART % (b"prompt", b"", b"x" * 70000) + b"--b--\r\n", FILE + PART % (b"x", b"", b"y") * 70 + b"--b--\r\n",
    b"--b\r\n" + b"X-Long: " + b"a" * 5000 + b"\r\n\r\nhi\r\n--b--\r\n", b"--c\r\n\r\n"],
    ids=str)
async def test_a_broken_form_is_refused(tmp_path: Path, body: bytes) -> None:
    async with speaking(tmp_path) as server, client(server) as http:
        response = await http.post("/v1/audio/transcriptions", content=body,
                                   headers={"content-type": "multipart/form-data; boundary=b"})
        refused(response, 400)
        assert not server.pipeline.recordings


async def test_other_media_are_415(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server, client(server) as http:
        for media in ("application/json", "multipart/form-data", "multipart/mixed; boundary=b", ""):
            response = await http.post("/v1/audio/transcriptions", content=b"{}", headers={"content-type": media})
            refused(response, 415)


async def test_a_client_that_goes_away_takes_its_recording_along(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        task = asyncio.create_task(post(server, "hang"))
        while not server.pipeline.recordings:
            await asyncio.sleep(0.01)
        task.cancel()
        await server.idle()
        assert server.pipeline.aborted == {server.pipeline.recordings[0].rid}


async def test_a_disk_that_is_full_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frontend.upload import Spool

    def full(self: Spool) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Spool, "open", full)
    async with speaking(tmp_path) as server:
        refused(await post(server), 503)


async def test_seconds_are_rounded_up_as_openai_bills_them(tmp_path: Path) -> None:
    async with speaking(tmp_path) as server:
        assert (await post(server, "a")).json()["usage"]["seconds"] == math.ceil(7.5)


async def test_what_a_dead_predecessor_spooled_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "spool.0").mkdir()
    (tmp_path / "spool.0" / "17").write_text("left")
    async with speaking(tmp_path):
        assert not list(tmp_path.glob("spool.*/*"))
