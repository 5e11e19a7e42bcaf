"""The bodies of plain (not streamed) answers: completion and chat objects.

Built once, when the last choice has ended. Run by the frontend; pure functions.
"""
from __future__ import annotations

from typing import Any

from frontend import logprobs
from frontend.collector import Update
from frontend.params import Ask
from frontend.request import Prompt, Request
from frontend.turn import Turn
from frontend.wire import finish_reason, prompt_ids, prompt_logprobs, usage_of


def completion(ask: Ask, request: Request, identity: dict[str, Any]) -> dict[str, Any]:
    """A text_completion; `identity` holds id, created and system_fingerprint."""
    return {
        "id": identity["id"], "object": "text_completion", "created": identity["created"], "model": ask.model,
        "choices": [_completion_choice(ask, u, p) for u, p in _shown(ask, request)],
        "system_fingerprint": identity["system_fingerprint"], "usage": usage_of(request)}


def shown_prompt_logprobs(ask: Ask, prompt: Prompt) -> list[dict[str, Any] | None] | None:
    """The field `prompt_logprobs`; None where they never came."""
    told = prompt_logprobs(prompt)
    return told and logprobs.prompt_tokens(*told, ask.tokens_as_ids)


def _shown(ask: Ask, request: Request) -> list[tuple[Update, Prompt]]:
    """The choices of the answer with their prompts, numbered anew where only the likeliest are kept (best_of)."""
    updates = {u.index: u for u in request.take()}
    found = [(updates[c.index], c.prompt) for c in request.choices]
    if not ask.keep:
        return found
    n, kept = request.spec.n, []
    for first in range(0, len(found), n):
        kept += sorted(found[first:first + n], key=lambda pair: -logprobs.mean(pair[0].logprobs))[:ask.keep]
    for index, (update, _) in enumerate(kept):
        update.index = index
    return kept


def _completion_choice(ask: Ask, update: Update, prompt: Prompt) -> dict[str, Any]:
    choice = {"index": update.index, "text": (prompt.echo or "") + update.text, "logprobs": None,
              "finish_reason": finish_reason(update.finish), "stop_reason": update.stop}
    told = prompt_logprobs(prompt)
    if ask.logprobs is not None:
        parts = [] if told is None or prompt.echo is None else [told]
        if update.logprobs is not None:
            parts.append((update.logprobs, update.ids))
        choice["logprobs"] = logprobs.CompletionLogprobs(ask.tokens_as_ids).piece(parts)
    if ask.prompt_logprobs:
        choice["prompt_logprobs"] = shown_prompt_logprobs(ask, prompt)
    if ask.token_ids:
        choice["prompt_token_ids"], choice["token_ids"] = prompt_ids(prompt), list(update.ids)
    return choice


def chat(ask: Ask, request: Request, identity: dict[str, Any]) -> dict[str, Any]:
    """A chat.completion."""
    prompt = request.spec.prompts[0]
    body = {
        "id": identity["id"], "object": "chat.completion", "created": identity["created"], "model": ask.model,
        "choices": [_chat_choice(ask, u) for u, _ in _shown(ask, request)],
        "system_fingerprint": identity["system_fingerprint"], "usage": usage_of(request)}
    if ask.prompt_logprobs:
        body["prompt_logprobs"] = shown_prompt_logprobs(ask, prompt)
    if ask.token_ids:
        body["prompt_token_ids"] = prompt_ids(prompt)
    if ask.prompt_text:
        body["prompt_text"] = prompt.echo
    return body


def _chat_choice(ask: Ask, update: Update) -> dict[str, Any]:
    turn = Turn(ask, update.index)
    message, (ids, told) = turn.message(update), turn.tokens(update)
    choice: dict[str, Any] = {
        "index": update.index, "message": message, "logprobs": None, "finish_reason": turn.reason(update),
        "stop_reason": update.stop}
    if ask.logprobs is not None:
        content = [] if told is None else logprobs.chat_content(told, ids, ask.tokens_as_ids)
        choice["logprobs"] = {"content": content, "refusal": None}
    if ask.token_ids:
        choice["token_ids"] = list(ids)
    return choice
