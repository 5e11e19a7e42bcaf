"""The web options of a real server together: HTTPS with a certificate that is replaced, CORS, a prefix, keys, logs."""
from __future__ import annotations

import json
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests import certificates
from tests.serving import Server, gguf
from tests.waiting import until

PAGE = "https://app.example.org"
KEY = {"Authorization": "Bearer sesame"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="module")
def secure(folder: Path) -> Iterator[Server]:
    certificate, key = certificates.write(folder)
    (folder / "keys").write_text("sesame\n")
    with Server("--null-engine", "echo", "--served-model-name", "null", "--ssl-certfile", str(certificate), "--ssl-keyfile",
                str(key), "--root-path", "/llm", "--allowed-origins", PAGE, "--api-key-file", str(folder / "keys"),
                "--enable-log-requests", "--max-log-len", "9", "--max-model-len", "256", "--chat-template", "chatml",
                "--pipeline-parallel-size", "1", model=str(gguf())) as server:
        yield server


def trusting(number: int) -> httpx.Client:
    return httpx.Client(verify=ssl.create_default_context(cadata=certificates.CERTIFICATES[number]), timeout=30)


def test_it_says_where_it_serves_and_what_has_no_effect(secure: Server) -> None:
    assert secure.url.startswith("https://127.0.0.1:")
    assert any("--pipeline-parallel-size has no effect of its own" in line for line in secure.lines)


def test_openais_client_over_https_under_the_prefix(secure: Server) -> None:
    with trusting(0) as http, OpenAI(base_url=secure.url + "/llm/v1", api_key="sesame", http_client=http) as client:
        chunks = list(client.chat.completions.create(
            model="null", messages=[{"role": "user", "content": "my secret"}], max_tokens=8, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length"
        raw = client.with_options(default_headers={"Origin": PAGE}).models.with_raw_response.list()
        assert raw.headers["access-control-allow-origin"] == PAGE


def test_prompts_are_logged_up_to_the_length(secure: Server) -> None:
    def lines() -> list[dict]:
        text = (secure.root / "logs" / "frontend.0.log").read_text()
        return [json.loads(line) for line in text.splitlines() if '"prompts"' in line]
    until(lambda: bool(lines()), 5.0, "a line about a request")
    assert lines()[0]["prompts"] == ['[{"role":'] and lines()[0]["params"]["max_tokens"] == 8
    assert "sesame" not in secure.logs()


def test_sighup_takes_the_new_certificate_and_the_new_keys(secure: Server, folder: Path) -> None:
    with trusting(1) as http:
        with pytest.raises(httpx.ConnectError):
            http.get(secure.url + "/v1/models", headers=KEY)
    certificates.write(folder, 1)
    (folder / "keys").write_text("open\n")
    assert secure.process is not None
    secure.process.send_signal(signal.SIGHUP)

    def renewed() -> bool:
        with trusting(1) as http:
            try:
                return http.get(secure.url + "/v1/models", headers={"Authorization": "Bearer open"}).status_code == 200
            except httpx.ConnectError:
                return False
    until(renewed, 10.0, "the new certificate")
    with trusting(1) as http:
        assert http.get(secure.url + "/v1/models", headers=KEY).status_code == 401
