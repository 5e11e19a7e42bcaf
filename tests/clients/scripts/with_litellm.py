"""litellm: its `hosted_vllm` and `openai` providers; answers, streams, tools, and errors under its own types."""
import asyncio
import json
import os

import litellm

BASE, MODEL = os.environ["QUARTET_URL"] + "/v1", os.environ["QUARTET_MODEL"]
ASK = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}}}


def one(provider: str) -> dict:
    common = {"model": f"{provider}/{MODEL}", "api_base": BASE, "api_key": "none", "temperature": 0, "max_tokens": 96,
              "num_retries": 0}
    answer = litellm.completion(messages=ASK, **common)
    chunks = list(litellm.completion(messages=ASK, stream=True, stream_options={"include_usage": True}, **common))
    built = litellm.stream_chunk_builder(chunks, messages=ASK)
    later = asyncio.run(litellm.acompletion(messages=ASK, top_k=1, **common))
    called = litellm.completion(messages=ASK, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}},
                                **common)
    try:
        litellm.completion(messages=ASK, **{**common, "model": f"{provider}/nobody"})
        error = None
    except litellm.NotFoundError as raised:
        error = type(raised).__name__
    return {
        "text": answer.choices[0].message.content, "tokens": answer.usage.completion_tokens,
        "streamed": built.choices[0].message.content, "stream_tokens": built.usage.completion_tokens,
        "async": later.choices[0].message.content, "error": error,
        "call": [c.function.model_dump() for c in called.choices[0].message.tool_calls]}


print(json.dumps({provider: one(provider) for provider in ("hosted_vllm", "openai")}))
