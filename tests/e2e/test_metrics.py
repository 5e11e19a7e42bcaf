"""What /metrics shows: the documented families with sane values, and the names of older boards."""
from __future__ import annotations

import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import ROOT, Server
from tests.waiting import until


def values(server: Server) -> dict[str, float]:
    """Sample name -> sum over labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_every_metric_is_on_its_page(null: Server) -> None:
    page = set(re.findall(r"`([a-z]+[:_][a-z0-9_]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    shown = {line.split()[2] for line in httpx.get(null.url + "/metrics").text.splitlines() if line.startswith("# HELP")}
    assert shown - page == set()


def test_a_request_is_counted_once_everywhere(null: Server) -> None:
    until(lambda: "vllm:cache_config_info" in values(null), 5.0, "the engine's first snapshot")
    before = values(null)
    body = {"prompt": "count me", "max_tokens": 5, "n": 2, "ignore_eos": True}
    answer = httpx.post(null.url + "/v1/completions", json=body)
    usage = answer.json()["usage"]

    def grown(name: str) -> float:
        return values(null).get(name, 0.0) - before.get(name, 0.0)
    until(lambda: grown("vllm:generation_tokens_total") == usage["completion_tokens"] == 10, 5.0, "the engine's snapshot")
    until(lambda: grown("vllm:request_max_num_generation_tokens_count") == 1, 5.0, "the frontend's snapshot")
    assert grown("vllm:prompt_tokens_total") in (usage["prompt_tokens"], 2 * usage["prompt_tokens"])
    for name, count in {"vllm:e2e_request_latency_seconds": 1, "vllm:request_params_n": 1,
                        "vllm:request_max_num_generation_tokens": 1, "vllm:request_inference_time_seconds": 2,
                        "vllm:request_time_per_output_token_seconds": 2, "vllm:request_generation_tokens": 2}.items():
        assert grown(name + "_count") == count, name
    assert grown("vllm:request_max_num_generation_tokens_sum") == 5
    assert grown("vllm:request_success_total") == 2
    assert grown("http_response_size_bytes_sum") >= len(answer.content)
    assert grown("http_request_size_bytes_sum") >= len(answer.request.content)


def test_older_boards_find_their_names(null: Server) -> None:
    now = values(null)
    for old, new in {"vllm:time_per_output_token_seconds_count": "vllm:inter_token_latency_seconds_count",
                     "vllm:gpu_cache_usage_perc": "vllm:kv_cache_usage_perc",
                     "vllm:gpu_prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
                     "vllm:gpu_prefix_cache_hits_total": "vllm:prefix_cache_hits_total"}.items():
        assert now[old] == now[new]
