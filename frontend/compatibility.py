"""docs/compatibility.md, made from the schemas: ``python -m frontend.compatibility > docs/compatibility.md``.

For each endpoint every parameter that vLLM (or OpenAI, Jina, Cohere) knows there, and what this server does with it. The
list of those is the yardstick below; what is honoured is read from the schemas that validate. Never run by a server.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from pydantic import BaseModel

from frontend import speech_schema
from frontend.docs import kind
from frontend.fields import NO_EFFECT, REFUSED
from frontend.openapi import FORMS, POSTS

_SAMPLING = """
    model stream stream_options n temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty
    seed stop stop_token_ids include_stop_str_in_output ignore_eos max_tokens min_tokens logit_bias allowed_token_ids
    bad_words logprobs prompt_logprobs logprob_token_ids skip_special_tokens spaces_between_special_tokens
    add_special_tokens truncate_prompt_tokens truncation_side echo best_of use_beam_search length_penalty early_stopping
    response_format structured_outputs guided_json guided_regex guided_choice guided_grammar structural_tag
    guided_decoding_backend guided_whitespace_pattern repetition_detection thinking_token_budget priority cache_salt
    request_id session_id return_token_ids return_tokens_as_token_ids stream_interval user logits_processors vllm_xargs
    watermarking kv_transfer_params ec_transfer_params routed_experts_prompt_start return_token_offsets mm_payload
    return_mm_kwargs store metadata service_tier safety_identifier prompt_cache_key
"""
_TEMPLATE = """
    messages tools add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs
"""
_COMMON = """
    model truncate_prompt_tokens truncation_side priority request_id user use_activation mm_processor_kwargs padding
    cache_salt
"""
_CHAT = "messages add_generation_prompt continue_final_message chat_template chat_template_kwargs media_io_kwargs"
_VECTORS = f"input {_COMMON} add_special_tokens {_CHAT} encoding_format embed_dtype endianness dimensions normalize"
_SCORING = f"{_COMMON} softmax activation max_tokens_per_query max_tokens_per_doc instruction chat_template_kwargs"
_SPEECH = """
    file model prompt response_format language to_language stream stream_include_usage stream_continuous_usage_stats
    temperature top_p top_k min_p seed frequency_penalty presence_penalty repetition_penalty use_beam_search n
    length_penalty include_stop_str_in_output max_completion_tokens hotwords watermarking vllm_xargs
"""
YARDSTICK: dict[str, tuple[str, ...]] = {path: tuple(dict.fromkeys(names.split())) for path, names in {
    "/v1/completions": f"prompt {_SAMPLING} suffix prompt_embeds",
    "/v1/chat/completions": f"{_TEMPLATE} {_SAMPLING} max_completion_tokens top_logprobs tool_choice parallel_tool_calls"
                            " reasoning_effort include_reasoning return_prompt_text audio modalities prediction functions"
                            " function_call verbosity web_search_options",
    "/tokenize": f"model prompt add_special_tokens return_token_strs tools {_CHAT} mm_processor_kwargs",
    "/detokenize": "model tokens",
    "/v1/embeddings": _VECTORS,
    "/pooling": f"{_VECTORS} task softmax activation",
    "/classify": f"input {_COMMON} add_special_tokens {_CHAT} softmax activation",
    "/score": f"text_1 text_2 {_SCORING}",
    "/rerank": f"query documents top_n return_documents {_SCORING}",
    "/v1/audio/transcriptions": f"{_SPEECH} timestamp_granularities include chunking_strategy",
    "/v1/audio/translations": f"{_SPEECH} timestamp_granularities",
}.items()}

# Why a field may be accepted without effect.
WHY: dict[str, str] = {
    "user": "a label for the provider: nothing here depends on who asks",
    "safety_identifier": "a label for the provider: nothing here depends on who asks",
    "session_id": "a label for the provider: nothing here depends on who asks",
    "store": "nothing is stored", "metadata": "nothing is stored", "service_tier": "there is one tier",
    "prediction": "a hint about speed, never about the answer",
    "prompt_cache_key": "a hint about speed; the prefix cache needs none",
    "prompt_cache_retention": "a hint about speed; the prefix cache needs none",
    "stream_options.include_obfuscation": "padding against a reader of the encrypted stream, which TLS can add",
}


def status(path: str, name: str) -> tuple[str, str]:
    """("honoured" | "refused" | "no effect" | "unknown", what else there is to say) of a parameter at an endpoint."""
    if path in FORMS:
        return _form_status(FORMS[path][1], name)
    bodies = POSTS[path][1]
    if name in REFUSED and not any(name in getattr(body, "HONOURS", ()) for body in bodies):
        values = [f"`{json.dumps(value)}`" for value in REFUSED[name]]
        return "refused", f"taken as {' or '.join(values)}, which asks for nothing" if values else ""
    for body in bodies:
        if name in body.model_fields:
            return "honoured", _note(body, name)
    if name in NO_EFFECT:
        return "no effect", WHY[name]
    return "unknown", "ignored, as every field that nobody knows"


def _form_status(body: type[BaseModel], name: str) -> tuple[str, str]:
    """The same for a form, whose values are text."""
    if name == "file":
        return "honoured", "the recording: flac, m4a, mp3, mp4, mpeg, mpga, ogg, opus, wav or webm"
    if name in speech_schema.REFUSED:
        values = [f"`{value}`" for value in speech_schema.REFUSED[name]]
        return "refused", f"taken as {' or '.join(values)}, which asks for nothing" if values else ""
    return ("honoured", _note(body, name)) if name in body.model_fields else (
        "unknown", "ignored, as every field that nobody knows")


def _note(body: type[BaseModel], name: str) -> str:
    schema = body.model_json_schema()["properties"][name]
    words = kind(schema)
    said = schema.get("description") or next((s["description"] for s in schema.get("anyOf", ()) if "description" in s), "")
    return f"{words}; {said}" if said else words


def _rows(path: str, names: Iterable[str]) -> list[str]:
    return [f"| `{name}` | {found} | {note.replace('|', chr(92) + '|')} |" for name in names
            for found, note in [status(path, name)]]


def own(path: str) -> list[str]:
    """Parameters of ours that the yardstick does not have there."""
    bodies = (FORMS[path][1],) if path in FORMS else POSTS[path][1]
    fields = dict.fromkeys(name for body in bodies for name in body.model_fields)
    return [name for name in fields if name not in YARDSTICK.get(path, ())]


def page() -> str:
    """The whole document."""
    lines = ["# Compatibility", "",
             "Made by `python -m frontend.compatibility` from the schemas that validate; a test compares.",
             "*honoured*: does what its name says, or is an error that names it. *refused*: 400 `unsupported_parameter`, never",
             "ignored. *no effect*: accepted, and why it changes nothing. `null` is the same as leaving a parameter out.", ""]
    for path, entry in POSTS.items():
        same = [other for other in POSTS if POSTS[other] == entry]
        if path != same[0]:
            continue
        lines += [f"## POST {', '.join(same)}", "", "| Parameter | Here | |", "|---|---|---|",
                  *_rows(path, [*YARDSTICK.get(path, ()), *own(path)]), ""]
    for path in FORMS:
        lines += [f"## POST {path}", "", "| Parameter | Here | |", "|---|---|---|",
                  *_rows(path, [*YARDSTICK[path], *own(path)]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
