"""What the web adds: pages of other origins, prefixes of proxies, HTTPS, and the small routes that operators ask."""
from __future__ import annotations

import asyncio
import json
import logging
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontend.certificate import Certificate
from frontend.invocations import Invocations
from pipeline.config import AccessLogConfig, CorsConfig, HttpConfig, ModelConfig, TlsConfig
from pipeline.errors import StartError
from pipeline.messages import Kind, Load
from tests import certificates
from tests.frontend.served import Served, served
from tests.frontend.test_http import HELLO, assert_error, client

PAGE = "https://app.example.org"


# ---- CORS ----

def preflight(method: str = "POST", headers: str = "authorization, content-type", origin: str = PAGE) -> dict[str, str]:
    return {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}


async def test_no_page_is_told_anything_by_default() -> None:
    async with served() as server, client(server) as c:
        for response in (await c.get("/v1/models", headers={"Origin": PAGE}),
                         await c.options("/v1/models", headers=preflight("GET"))):
            assert not [name for name in response.headers if name.startswith("access-control")]


async def test_a_page_of_a_named_origin_may_call_with_a_key() -> None:
    http = HttpConfig(api_keys=("sesame",), cors=CorsConfig(origins=(PAGE,), credentials=True))
    async with served(http=http) as server, client(server) as c:
        asked = await c.options("/v1/chat/completions", headers=preflight())
        assert asked.status_code == 204                                  # a preflight carries no key
        assert asked.headers["access-control-allow-origin"] == PAGE and asked.headers["vary"] == "Origin"
        assert asked.headers["access-control-allow-methods"] == "POST"
        assert asked.headers["access-control-allow-headers"] == "authorization, content-type"
        assert asked.headers["access-control-allow-credentials"] == "true"
        answer = await c.post("/v1/chat/completions", json=HELLO, headers={
            "Origin": PAGE, "Authorization": "Bearer sesame"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        refused = await c.post("/v1/chat/completions", json=HELLO, headers={"Origin": PAGE})
        assert_error(refused, 401, "invalid_api_key")
        assert refused.headers["access-control-allow-origin"] == PAGE    # the page may read why


async def test_streams_carry_the_headers_too() -> None:
    async with served(http=HttpConfig(cors=CorsConfig(origins=("*",)))) as server, client(server) as c:
        answer = await c.post("/v1/chat/completions", json={**HELLO, "stream": True}, headers={"Origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == "*" and answer.text.endswith("data: [DONE]\n\n")


async def test_other_origins_methods_and_headers_are_not_allowed() -> None:
    cors = CorsConfig(origins=(PAGE,), methods=("GET",), headers=("authorization",))
    async with served(http=HttpConfig(api_keys=("sesame",), cors=cors)) as server, client(server) as c:
        stranger = await c.options("/v1/models", headers=preflight("GET", origin="https://evil.example"))
        assert stranger.status_code == 401 and "access-control-allow-origin" not in stranger.headers
        method = await c.options("/v1/chat/completions", headers=preflight("POST"))
        assert method.status_code == 401 and "access-control-allow-methods" not in method.headers
        header = await c.options("/v1/models", headers=preflight("GET", "x-other"))
        assert header.status_code == 401 and "access-control-allow-headers" not in header.headers
        assert (await c.options("/v1/models", headers=preflight("GET", "Authorization"))).status_code == 204


# ---- proxies ----

async def test_a_root_path_is_answered_with_and_without_it() -> None:
    async with served(http=HttpConfig(root_path="/llm/v2", api_keys=("sesame",))) as server:
        async with client(server, headers={"Authorization": "Bearer sesame"}) as c:
            for path in ("/v1/models", "/llm/v2/v1/models"):
                assert (await c.get(path)).json()["data"][0]["id"] == "tiny"
            assert (await c.post("/llm/v2/v1/chat/completions", json=HELLO)).status_code == 200
            document = (await c.get("/llm/v2/openapi.json")).json()
            assert document["servers"] == [{"url": "/llm/v2"}]
            assert 'handler="/v1/models"' in (await c.get("/metrics")).text
        async with client(server) as c:
            assert_error(await c.get("/llm/v2/v1/models"), 401, "invalid_api_key")


# ---- HTTPS ----

def tls_config(folder: Path, **changes: Any) -> TlsConfig:
    certificate, key = certificates.write(folder)
    return TlsConfig(certfile=str(certificate), keyfile=str(key), **changes)


def trusting(number: int = 0) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=certificates.CERTIFICATES[number])


async def test_https_answers_and_streams_and_plain_http_does_not(tmp_path: Path) -> None:
    async with served(http=HttpConfig(tls=tls_config(tmp_path))) as server:
        async with httpx.AsyncClient(base_url=f"https://localhost:{server.port}", verify=trusting()) as c:
            assert (await c.get("/v1/models")).status_code == 200
            answer = await c.post("/v1/chat/completions", json={
                "messages": [{"role": "user", "content": "count 300"}], "stream": True, "max_tokens": 250})
            assert answer.text.count("data: ") > 3 and answer.text.endswith("data: [DONE]\n\n")
        async with client(server) as c:
            with pytest.raises(httpx.HTTPError):
                await c.get("/v1/models")


async def test_a_client_certificate_may_be_required(tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    authority.write_text(certificates.CERTIFICATES[1])
    async with served(http=HttpConfig(tls=tls_config(tmp_path, ca_certs=str(authority), cert_reqs=2))) as server:
        url = f"https://localhost:{server.port}/v1/models"
        async with httpx.AsyncClient(verify=trusting()) as c:
            with pytest.raises(httpx.HTTPError):
                await c.get(url)
        known = trusting()
        (tmp_path / "c").mkdir()
        known.load_cert_chain(*certificates.write(tmp_path / "c", 1))
        async with httpx.AsyncClient(verify=known) as c:
            assert (await c.get(url)).status_code == 200


async def presented(server: Served, context: ssl.SSLContext) -> bool:
    """Whether a new connection sees a certificate that `context` trusts."""
    try:
        _, writer = await asyncio.open_connection("localhost", server.port, ssl=context)
    except ssl.SSLCertVerificationError:
        return False
    writer.close()
    return True


async def test_a_certificate_is_replaced_without_a_restart_and_a_broken_one_is_not_taken(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Certificate(tls_config(tmp_path))
    monkeypatch.setattr("pipeline.tls.context", lambda _: made.context)
    async with served(http=HttpConfig(tls=tls_config(tmp_path))) as server:
        assert await presented(server, trusting(0)) and not await presented(server, trusting(1))
        certificates.write(tmp_path, 1)
        made.reload()
        assert await presented(server, trusting(1)) and not await presented(server, trusting(0))
        (tmp_path / "server.key").write_text("broken")
        made.reload()
        assert await presented(server, trusting(1))


@pytest.mark.parametrize(("breakage", "part"), [
    (lambda folder: (folder / "server.crt").unlink(), "does not exist"),
    (lambda folder: (folder / "server.key").write_text(certificates.KEYS[1]), "belong together"),
    (lambda folder: (folder / "server.crt").write_text("no certificate"), "must be PEM"),
])
async def test_files_that_are_no_certificate_are_named(tmp_path: Path, breakage: Any, part: str) -> None:
    config = tls_config(tmp_path)
    breakage(tmp_path)
    with pytest.raises(StartError, match=part) as caught:
        Certificate(config)
    assert caught.value.exit_code == 2


# ---- headers of requests ----

async def test_the_size_of_a_head_is_limited_as_configured() -> None:
    for limit, status in ((8192, 413), (65536, 200)):
        async with served(http=HttpConfig(max_header_bytes=limit)) as server, client(server) as c:
            response = await c.get("/v1/models", headers={"X-Padding": "x" * 20_000})
            assert response.status_code == status


# ---- small routes ----

async def test_load_counts_the_requests_in_flight() -> None:
    async with served() as server, client(server) as c:
        assert (await c.get("/load")).json() == {"server_load": 0}
        server.pipeline.manual = True
        task = asyncio.create_task(c.post("/v1/completions", json={"prompt": "x"}))
        while not server.pipeline.submits:
            await asyncio.sleep(0)
        assert (await c.get("/load")).json() == {"server_load": 1}
        server.pipeline.run()
        assert (await task).status_code == 200
        assert (await c.get("/load")).json() == {"server_load": 0}


@pytest.mark.parametrize(("form", "expected"), [
    ("text", "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3"),
    ("JSON", 'JSON {"named_metrics": {"kv_cache_usage_perc": 0.25, "num_requests_waiting": 3}}'), ("xml", None)])
async def test_an_answer_reports_the_load_to_those_who_ask(form: str, expected: str | None) -> None:
    async with served() as server, client(server) as c:
        server.latest[Kind.ENGINE, 0].beacon.load = Load(waiting=3, kv_used=10, kv_total=40)
        answer = await c.post("/v1/chat/completions", json=HELLO, headers={"endpoint-load-metrics-format": form})
        assert answer.headers.get("endpoint-load-metrics") == expected
        assert "endpoint-load-metrics" not in (await c.post("/v1/chat/completions", json=HELLO)).headers


async def test_tokenizer_info_is_there_only_where_it_is_switched_on(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "T", "eos_token": "</s>", "chat_template": "own"}))
    models = (ModelConfig(names=("a",), path=str(tmp_path), max_model_len=256),
              ModelConfig(names=("b",), path="/nowhere", tokenizer=str(tmp_path), chat_template="given",
                          max_model_len=256))
    async with served(models=models) as server, client(server) as c:
        assert_error(await c.get("/tokenizer_info"), 404, "not_found")
    async with served(models=models, http=HttpConfig(tokenizer_info=True)) as server, client(server) as c:
        assert (await c.get("/tokenizer_info?model=a")).json() == {
            "tokenizer_class": "T", "eos_token": "</s>", "chat_template": "own"}
        assert (await c.get("/tokenizer_info?model=b")).json()["chat_template"] == "given"
        assert_error(await c.get("/tokenizer_info?model=c"), 404, "model_not_found", "model")


async def test_ping_takes_both_methods() -> None:
    async with served() as server, client(server) as c:
        for response in (await c.get("/ping"), await c.post("/ping"), await c.post("/ping", json={"x": 1})):
            assert response.status_code == 200 and response.json()["status"] == "ok"


async def test_invocations_go_where_the_body_points() -> None:
    async with served() as server, client(server) as c:
        chat = (await c.post("/invocations", json=HELLO)).json()
        assert chat["object"] == "chat.completion" and chat["choices"][0]["message"]["content"] == "Hello there!"
        text = (await c.post("/invocations", json={"prompt": "x", "stream": True})).text
        assert '"object":"text_completion"' in text and text.endswith("data: [DONE]\n\n")
        for body in ({}, {"input": "x"}, {"model": "tiny"}):
            assert_error(await c.post("/invocations", json=body), 400, "invalid_request")
        assert_error(await c.post("/invocations", json={"prompt": "x", "temperature": 9}), 400, "invalid_value",
                     "temperature")


async def test_invocations_follow_what_the_models_do() -> None:
    models = tuple(ModelConfig(names=(task,), path="/nowhere", task=task, max_model_len=256, vocab_size=1000)
                   for task in ("generate", "embed", "classify"))
    async with served(models=models) as server:
        route = Invocations(server.frontend, None)._route  # type: ignore[arg-type]
        assert route({"messages": [], "model": "generate"}) == route({"messages": []}) == "/v1/chat/completions"
        assert route({"input": "x"}) == route({"input": "x", "model": "embed"}) == "/v1/embeddings"
        assert route({"messages": [], "model": "embed"}) == "/v1/embeddings"
        assert route({"input": "x", "model": "classify"}) == "/classify"
        assert route({"query": "x", "documents": []}) == "/rerank" and route({"text_1": "", "text_2": ""}) == "/score"
        assert route({"input": "x", "model": "generate"}) is None


# ---- defaults that the operator sets ----

async def test_the_response_role() -> None:
    async with served(http=HttpConfig(response_role="oracle")) as server, client(server) as c:
        async def role(**changes: Any) -> str:
            answer = await c.post("/v1/chat/completions", json={**HELLO, **changes})
            return str(answer.json()["choices"][0]["message"]["role"])
        assert await role() == "oracle"
        assert await role(add_generation_prompt=False) == "user"         # the last message goes on
        streamed = (await c.post("/v1/chat/completions", json={**HELLO, "stream": True})).text
        assert '"delta":{"role":"oracle","content":""}' in streamed


async def test_usage_may_be_forced_on_every_stream() -> None:
    for forced in (False, True):
        async with served(http=HttpConfig(force_usage=forced)) as server, client(server) as c:
            text = (await c.post("/v1/chat/completions", json={**HELLO, "stream": True})).text
            last = json.loads(text.split("data: ")[-2])
            assert (last["choices"] == [] and last["usage"]["completion_tokens"] == 3) is forced


async def test_tokens_may_be_named_by_their_ids_by_default() -> None:
    async with served(http=HttpConfig(tokens_as_ids=True)) as server, client(server) as c:
        async def token(**changes: Any) -> str:
            body = {"prompt": "x", "logprobs": 0, "max_tokens": 1, **changes}
            return str((await c.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]["tokens"][0])
        assert await token() == "token_id:10"
        assert await token(return_tokens_as_token_ids=False) == "Hello"


# ---- logs ----

async def logged(caplog: pytest.LogCaptureFixture, config: AccessLogConfig, *bodies: dict[str, Any]) -> list[Any]:
    """What the frontend writes about these completions."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "frontend"):
        async with served(http=HttpConfig(log=config)) as server, client(server) as c:
            for body in bodies:
                path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
                assert (await c.post(path, json=body)).status_code == 200
    return [record for record in caplog.records if record.name in ("frontend.access", "frontend.requests")]


SECRET = {"prompt": "say my secret|is out", "temperature": 0.5, "max_tokens": 9}


async def test_prompts_are_in_no_line_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    [line] = await logged(caplog, AccessLogConfig(), SECRET)
    assert line.name == "frontend.access" and "secret" not in str(line.__dict__)


async def test_requests_and_answers_are_logged_up_to_a_length(caplog: pytest.LogCaptureFixture) -> None:
    config = AccessLogConfig(requests=True, outputs=True, max_len=12)
    lines = await logged(caplog, config, SECRET, {**SECRET, "stream": True},
                         {"messages": [{"role": "user", "content": "hi"}]}, {"prompt": [5, 6]})
    fields = [line.fields for line in lines if line.name == "frontend.requests"]
    asked = [f for f in fields if "prompts" in f]
    assert [f["prompts"] for f in asked] == [["say my secre"], ["say my secre"], ['[{"role":"us'], [[5, 6]]]
    assert asked[0]["params"]["temperature"] == 0.5 and asked[0]["params"]["max_tokens"] == 9
    assert [len(f["answer"]) for f in fields if "answer" in f] == [12, 12, 12, 12]
    assert all(line.fields["request_id"] for line in lines)


async def test_the_access_log_may_be_off_or_leave_paths_out(caplog: pytest.LogCaptureFixture) -> None:
    assert await logged(caplog, AccessLogConfig(enabled=False), SECRET) == []
    assert await logged(caplog, AccessLogConfig(quiet_paths=("/v1/completions",)), SECRET) == []
    assert len(await logged(caplog, AccessLogConfig(quiet_paths=("/tokenize",)), SECRET)) == 1
