"""The ingress over real sockets: keys, hosts, bodies, request ids, and an OpenAI-shaped error for everything."""
from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from sanic import Sanic

from frontend.keys import Hosts, Keys
from pipeline.config import HttpConfig, LimitsConfig
from pipeline.errors import CATALOGUE, QuartetError, StartError
from pipeline.messages import Kind, State
from tests.frontend.served import Served, served
from tests.frontend.world import beacon, config

OPEN = {"/live", "/ready", "/health", "/ping"}
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def client(server: Served, **changes: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=10, **changes)


def assert_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", response.headers["x-request-id"])
    body: dict[str, Any] = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"], body["error"]["type"]) == (code, param, CATALOGUE[code][1])
    return body["error"]


async def raw(server: Served, data: bytes) -> tuple[int, bytes]:
    """Status and everything that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return int(answer.split(b" ", 2)[1]), answer


def routes(app: Sanic[Any, Any]) -> list[tuple[str, str]]:
    found = []
    for route in app.router.routes:
        path = "/" + route.path.replace("<name:path>", "tiny")
        found += [(method, path) for method in route.methods]
    return found


# ---- keys ----

async def test_every_route_needs_the_key_but_the_open_ones() -> None:
    http = HttpConfig(api_keys=("sesame",), metrics_need_key=True)
    async with served(http=http) as server, client(server) as c:
        seen = set()
        for method, path in routes(server.app):
            response = await c.request(method, path)
            seen.add(path)
            if path in OPEN:
                assert response.status_code in (200, 204), path
                continue
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert_error(response, 401, "invalid_api_key")
        assert seen >= OPEN | {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize",
                               "/metrics", "/openapi.json", "/version"}
        for path in ("/nope", "/v1", "/v1/", "/v1/x/../health"):
            assert_error(await c.get(path), 401, "invalid_api_key")


async def test_metrics_are_open_unless_switched() -> None:
    async with served(http=HttpConfig(api_keys=("sesame",))) as server, client(server) as c:
        assert (await c.get("/metrics")).status_code == 200


KEY_HEADERS = [
    (b"Bearer sesame", 200), (b"bearer sesame", 200), (b"Bearer  sesame ", 200), (b"Bearer second", 200),
    (b"Bearer sesam", 401), (b"Bearer sesame2", 401), (b"sesame", 401), (b"Basic sesame", 401), (b"Bearer", 401),
    (b"", 401), (b"Bearer s\xc3\xa9same", 401), (b"Bearer \xff\xfe", 401), (b"Bearer " + b"x" * 7000, 401)]


async def test_keys() -> None:
    async with served(http=HttpConfig(api_keys=("sesame", "second"))) as server:
        for header, status in KEY_HEADERS:
            got, _ = await raw(server, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                                       b"Authorization: " + header + b"\r\n\r\n")
            assert got == status, header


REQUEST_LINES = [
    b"GET /v1/../health HTTP/1.1\r\nHost: localhost", b"GET //health HTTP/1.1\r\nHost: localhost",
    b"GET /HEALTH HTTP/1.1\r\nHost: localhost", b"GET /%68ealth HTTP/1.1\r\nHost: localhost",
    b"GET http://x/v1/models HTTP/1.1\r\nHost: localhost",
    b"GET /v1/models?/health HTTP/1.1\r\nHost: localhost/health?",
    b"GET /v1/models#/health HTTP/1.1\r\nHost: localhost", b"GET /v1/models;/health HTTP/1.1\r\nHost: localhost",
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-Prefix: /health\r\nX-Original-Url: /health",
    b"GET /health%2f..%2fv1/models HTTP/1.1\r\nHost: localhost", b"GET /v1/models HTTP/1.0",
    b"PRI * HTTP/2.0\r\n", b"GET  /v1/models HTTP/1.1\r\nHost: x", b"get /v1/models HTTP/1.1\r\nHost: localhost"]


async def test_no_request_line_slips_past_the_key() -> None:
    async with served(http=HttpConfig(api_keys=("sesame",))) as server:
        for head in REQUEST_LINES:
            status, answer = await raw(server, head + b"\r\nConnection: close\r\n\r\n")
            assert status in (400, 401, 403, 404, 405) and b'"id"' not in answer and b'"error"' in answer, head


def test_keys_from_a_file_are_reloaded_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\ntwo\n")
    keys = Keys(HttpConfig(api_key_file=str(file), api_keys=("zero",)))
    assert all(keys.allow(f"Bearer {k}") for k in ("zero", "one", "two")) and not keys.allow("Bearer # ours")
    file.write_text("three\n")
    keys.reload()
    assert keys.allow("Bearer three") and not keys.allow("Bearer one")
    file.write_text("")
    keys.reload()
    assert keys.allow("Bearer three")
    file.unlink()
    keys.reload()
    assert keys.allow("Bearer three") and not keys.allow("Bearer ")


@pytest.mark.parametrize("http", [HttpConfig(api_keys=("",)), HttpConfig(api_keys=(" ",)),
                                  HttpConfig(api_key_file="/does/not/exist")])
def test_unusable_keys_stop_the_start(http: HttpConfig) -> None:
    with pytest.raises(StartError):
        Keys(http)


# ---- hosts ----

@pytest.mark.parametrize("http, host, allowed", [
    (HttpConfig(), "localhost:8000", True), (HttpConfig(), "127.0.0.1", True), (HttpConfig(), "127.1.2.3:1", True),
    (HttpConfig(), "[::1]:8000", True), (HttpConfig(), None, True), (HttpConfig(), "evil.test", False),
    (HttpConfig(), "localhost.evil.test", False), (HttpConfig(), "evil.test:8000", False),
    (HttpConfig(allowed_hosts=("My.Box",)), "my.box:8000", True), (HttpConfig(host="0.0.0.0"), "evil.test", True),
    (HttpConfig(host="::1"), "[::1]", True), (HttpConfig(uds="/x"), "anything", True)])
def test_host_names(http: HttpConfig, host: str | None, allowed: bool) -> None:
    hosts = Hosts(http)
    if allowed:
        hosts.check(host)
    else:
        with pytest.raises(QuartetError) as error:
            hosts.check(host)
        assert error.value.code == "forbidden_host"


async def test_a_foreign_host_name_gets_nothing() -> None:
    async with served() as server, client(server) as c:
        for path in ("/v1/models", "/health", "/nope"):
            assert_error(await c.get(path, headers={"Host": "evil.test"}), 403, "forbidden_host")


# ---- errors ----

async def test_errors_have_one_shape() -> None:
    async with served() as server, client(server) as c:
        url = "/v1/chat/completions"
        headers = {"content-type": "application/json"}
        assert_error(await c.post(url, content=b"{nonsense", headers=headers), 400, "invalid_request")
        assert_error(await c.post(url, content=b"", headers=headers), 400, "invalid_request")
        assert_error(await c.post(url, json=[1]), 400, "invalid_request")
        assert_error(await c.post(url, json={}), 400, "invalid_request", "messages")
        assert_error(await c.post(url, json={**HELLO, "n": "5"}), 400, "invalid_value", "n")
        assert_error(await c.post(url, json={**HELLO, "temperature": 3}), 400, "invalid_value", "temperature")
        assert_error(await c.post(url, json={**HELLO, "tools": [{}]}), 400, "invalid_request", "tools[0].function")
        assert_error(await c.post(url, json={**HELLO, "model": "gpt-9"}), 404, "model_not_found", "model")
        assert_error(await c.get("/nope"), 404, "not_found")
        assert_error(await c.get("/v1/models/nope"), 404, "model_not_found", "model")
        wrong_method = await c.get(url)
        assert_error(wrong_method, 405, "method_not_allowed")
        assert "POST" in wrong_method.headers["allow"]
        assert_error(await c.request("BREW", "/v1/models"), 405, "method_not_allowed")
        for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            response = await c.post(url, content=b"{}", headers={"content-type": media})
            assert_error(response, 415, "unsupported_media_type")
        compressed = await c.post(url, content=b"x", headers={**headers, "content-encoding": "gzip"})
        assert_error(compressed, 415, "unsupported_media_type")
        poison = [{"role": "user", "content": "fail numerical_error"}]
        assert_error(await c.post(url, json={"messages": poison}), 500, "numerical_error", "prompt")
        ok = await c.post(url, json=HELLO, headers={"content-type": "Application/JSON; charset=utf-8"})
        assert ok.status_code == 200


async def test_an_unexpected_fault_tells_nothing() -> None:
    async with served() as server, client(server) as c:
        async def broken(call: Any) -> None:
            raise ValueError("secret /path")
        server.frontend.stages.missing = broken  # type: ignore[method-assign, assignment]
        response = await c.get("/ready")
        assert "secret" not in response.text
        assert_error(response, 500, "internal_error")


async def test_bodies_that_are_too_large_are_refused_before_they_come() -> None:
    async with served(http=HttpConfig(max_body_bytes=1000)) as server, client(server) as c:
        assert_error(await c.post("/tokenize", json={"prompt": "x" * 1000}), 413, "payload_too_large")
        assert (await c.post("/tokenize", json={"prompt": "x" * 900})).status_code == 200
        head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        status, answer = await raw(server, head + b"Content-Length: 1000000000000\r\n\r\n")
        assert status == 413 and b"payload_too_large" in answer
        status, answer = await raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + b"190\r\n" + b"x" * 400
                                   + b"\r\n190\r\n" + b"x" * 400 + b"\r\n190\r\n" + b"x" * 400 + b"\r\n")
        assert status == 413 and b"payload_too_large" in answer


MALFORMED = [
    (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
     b"\r\nzz\r\n", 400),
    (b"garbage\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nX: " + b"y" * 20000 + b"\r\n\r\n", 413),
    (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\nContent-Length: 2\r\n\r\n{}", 417)]


async def test_malformed_http_is_answered_and_closed() -> None:
    async with served() as server:
        for data, status in MALFORMED:
            got, answer = await raw(server, data)
            body = json.loads(answer.split(b"\r\n\r\n", 1)[1])
            assert got == status and set(body["error"]) == {"message", "type", "param", "code"}, data


async def test_expect_continue_and_keep_alive_after_an_error() -> None:
    async with served() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for body, status in ((b"{", b"400"), (b'{"prompt":"ab"}', b"200")):
            writer.write(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 " + status)
            length = int(re.search(rb"content-length: (\d+)", head).group(1))  # type: ignore[union-attr]
            await reader.readexactly(length)
        writer.close()


# ---- request ids, HEAD, OPTIONS, slashes ----

async def test_request_ids() -> None:
    async with served() as server, client(server) as c:
        mine = await c.post("/v1/chat/completions", json=HELLO, headers={"X-Request-Id": "a.b:c-1"})
        assert mine.headers["x-request-id"] == "a.b:c-1" and mine.json()["id"] == "chatcmpl-a.b:c-1"
        body = await c.post("/v1/completions", json={"prompt": "x", "request_id": "label"})
        assert body.json()["id"] == "cmpl-label" and body.headers["x-request-id"] != "label"
        for bad in (b"", b"a b", "é".encode(), b"x" * 129, b"a\x1bb"):
            response = await c.get("/version", headers={"X-Request-Id": bad})
            assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"]), bad
        assert (await c.get("/nope", headers={"X-Request-Id": "mine"})).headers["x-request-id"] == "mine"


async def test_the_callers_id_is_a_label_and_never_a_key() -> None:
    async with served() as server, client(server, headers={"X-Request-Id": "same"}) as c:
        answers = await asyncio.gather(*(
            c.post("/v1/completions", json={"prompt": f"say {i}"}) for i in range(50)))
        assert [a.json()["choices"][0]["text"] for a in answers] == [str(i) for i in range(50)]


async def test_head_options_and_trailing_slashes() -> None:
    async with served() as server, client(server) as c:
        head = await c.head("/v1/models")
        assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 0
        options = await c.options("/v1/chat/completions")
        assert options.status_code == 204 and options.headers["allow"] == "POST, OPTIONS"
        assert "access-control-allow-origin" not in options.headers and "alt-svc" not in options.headers
        assert (await c.get("/v1/models/")).json()["object"] == "list"
        assert (await c.post("/v1/chat/completions/", json=HELLO)).status_code == 200


# ---- overload, draining ----

async def test_overload_is_answered_at_once() -> None:
    async with served(limits=LimitsConfig(max_requests=1)) as server, client(server) as c:
        first = asyncio.create_task(c.post("/v1/completions", json={"prompt": "hang"}))
        while not len(server.table):
            await asyncio.sleep(0.001)
        started = time.monotonic()
        second = await c.post("/v1/completions", json={"prompt": "x"})
        assert time.monotonic() - started < 0.5
        assert_error(second, 429, "server_overloaded")
        assert second.headers["retry-after"] == "1"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await server.idle()
        assert (await c.post("/v1/completions", json={"prompt": "x"})).status_code == 200


async def test_full_outboxes_are_an_overload() -> None:
    async with served() as server, client(server) as c:
        server.pipeline.full = True
        assert_error(await c.post("/v1/completions", json={"prompt": "x"}), 429, "server_overloaded")


async def test_draining_refuses_new_requests_and_closes_connections() -> None:
    async with served() as server, client(server) as c:
        server.table.draining = True
        response = await c.post("/v1/completions", json={"prompt": "x"})
        assert_error(response, 503, "draining")
        assert response.headers["connection"] == "close" and response.headers["retry-after"] == "1"
        assert (await c.get("/ready")).status_code == 503 and (await c.get("/live")).status_code == 200


async def test_poison_is_not_to_be_retried() -> None:
    async with served() as server, client(server) as c:
        response = await c.post("/v1/completions", json={"prompt": "fail poisoned_request"})
        assert_error(response, 500, "poisoned_request", "prompt")
        assert response.headers["x-should-retry"] == "false"


# ---- health ----

async def test_readiness() -> None:
    async with served() as server, client(server) as c:
        heard = server.latest[Kind.ENGINE, 0]
        heard.beacon.state = State.STARTING
        starting = await c.get("/ready")
        assert starting.status_code == 503 and starting.json() == {
            "status": "starting", "missing": ["engine.0"], "models": {"tiny": False}}
        heard.beacon.state = State.READY
        for path in ("/ready", "/health", "/ping"):
            assert (await c.get(path)).json() == {"status": "ok", "missing": [], "models": {"tiny": True}}
        heard.beacon = beacon(Kind.ENGINE, 0, pending=True, tick_age_ms=61_000)
        assert (await c.get("/health")).status_code == 503                # has work and does not turn
        heard.beacon = beacon(Kind.ENGINE, 0, pending=False, tick_age_ms=61_000)
        assert (await c.get("/health")).status_code == 200                # nothing to do is no hang
        heard.at_ns -= 10 * 10**9
        assert (await c.get("/health")).json()["missing"] == ["engine.0"]
        assert (await c.get("/live")).status_code == 200


async def test_one_missing_replica_does_not_make_a_ready_server_unready() -> None:
    async with served(tokenizers=2) as server, client(server) as c:
        server.latest[Kind.TOKENIZER, 1].beacon.state = State.STARTING
        assert (await c.get("/ready")).status_code == 503                 # never was ready
        server.latest[Kind.TOKENIZER, 1].beacon.state = State.READY
        assert (await c.get("/ready")).status_code == 200
        server.latest[Kind.TOKENIZER, 1].beacon.state = State.STARTING
        response = await c.get("/ready")
        assert response.status_code == 200 and response.json()["missing"] == ["tokenizer.1"]


# ---- the rest ----

async def test_models_version_and_description() -> None:
    async with served() as server, client(server) as c:
        listed = (await c.get("/v1/models")).json()
        assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["tiny", "alias"]
        one = (await c.get("/v1/models/alias")).json()
        assert (one["id"], one["object"], one["max_model_len"], one["context_length"]) == ("alias", "model", 256, 256)
        assert set((await c.get("/version")).json()) == {"version"}
        document = (await c.get("/openapi.json")).json()
        assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"}
        page = (await c.get("/docs")).text
        assert "max_completion_tokens" in page and "<script" not in page and "src=" not in page
        schema = {"$ref": "#/components/schemas/ChatBody", "components": document["components"]}
        jsonschema.validate({**HELLO, "stop": "x", "temperature": 1}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**HELLO, "temperature": 3}, schema)


async def test_tokenize_and_detokenize() -> None:
    async with served() as server, client(server) as c:
        answer = (await c.post("/tokenize", json={"prompt": "ab", "return_token_strs": True})).json()
        assert answer == {"count": 2, "max_model_len": 256, "tokens": [97, 98], "token_strs": ["a", "b"]}
        chat = (await c.post("/tokenize", json={"messages": HELLO["messages"]})).json()
        assert chat["tokens"] == [104, 105] and chat["token_strs"] is None
        assert (await c.post("/detokenize", json={"tokens": [97, 98]})).json() == {"prompt": "ab"}
        assert_error(await c.post("/detokenize", json={"tokens": [1000]}), 400, "invalid_value", "tokens")
        assert_error(await c.post("/detokenize", json={"tokens": [1] * 5000}), 400, "invalid_value", "tokens")
        assert_error(await c.post("/tokenize", json={}), 400, "invalid_request", "prompt")


async def test_metric_series_are_bounded_whatever_is_asked() -> None:
    async with served() as server, client(server) as c:
        async def series() -> set[str]:
            text = (await c.get("/metrics")).text
            return {line.split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
        for path in ("/nope", "/v1/models/x"):
            await c.get(path)
        await c.request("BREW", "/x")
        await c.get("/metrics")
        await c.post("/v1/completions", json={"prompt": "x"})
        await c.post("/v1/completions", json={"prompt": "x", "model": "m"})
        before = await series()
        for i in range(30):
            await c.request(f"BREW{i}", f"/path{i}")
            await c.get(f"/v1/models/{i}")
            await c.post("/v1/completions", json={"prompt": "x", "model": f"m{i}"})
        assert await series() == before
        assert 'vllm:time_to_first_token_seconds_count{engine="0",model_name="tiny"}' in before
        assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}' in before


def test_config_keeps_the_defaults_of_the_documentation() -> None:
    assert config().http.host == "127.0.0.1" and config().http.max_body_bytes == 32 * 2**20
