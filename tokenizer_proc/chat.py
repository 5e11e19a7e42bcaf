"""A chat and a model's template -> the text of the prompt, cut into pieces that are encoded one by one.

Run by the tokenizer. One path for every route that renders a template.
"""
from __future__ import annotations

from typing import Any, Protocol

from pipeline.errors import QuartetError
from pipeline.messages import Chat
from tokenizer_proc.guard import Guard, Piece, strings, unused
from tokenizer_proc.messages import normalise, parse, template_kwargs, text_chars, wrong
from tokenizer_proc.template import ChatTemplate
from tokenizer_proc.toolless import told


class ChatModel(Protocol):
    """What rendering needs to know of a model."""

    guard: Guard
    named_tokens: dict[str, str]
    max_prompt_chars: int
    max_output_chars: int
    content_format: str
    template_defaults: dict[str, Any]

    @property
    def pair_template(self) -> ChatTemplate:
        """What joins two texts into one chat, for a model that is configured to score so."""

    def template(self, has_tools: bool = False, has_documents: bool = False) -> ChatTemplate:
        """QuartetError when the model has none."""

    def check_chars(self, chars: int) -> None:
        """QuartetError when so many characters cannot fit the context."""


def render(model: ChatModel, chat: Chat, *, trust_template: bool, may_be_long: bool) -> list[Piece]:
    """The prompt's pieces. `may_be_long`: the prompt will be truncated, so that its length is no error."""
    if chat.add_generation_prompt and chat.continue_final_message:
        raise wrong("'add_generation_prompt' and 'continue_final_message' cannot both be true.",
                    "continue_final_message")
    tools = parse(chat.tools_json, list, "tools")
    documents = parse(chat.documents_json, list, "documents")
    template = _template(model, chat, trust_template, bool(tools), bool(documents))
    if documents and not template.mentions("documents"):
        raise QuartetError("unsupported_parameter", "The chat template of this model shows no 'documents'"
                           + (" beside 'tools'." if tools else "."), "documents")
    variables: dict[str, Any] = {
        **model.template_defaults, **template_kwargs(chat.kwargs_json),
        "messages": normalise(chat.messages_json, wants_parts=template.wants_parts,
                              knows_developer=template.mentions("developer"),
                              wants_argument_text=template.wants_argument_text),
        "tools": tools or None, "documents": documents or None,
    }
    variables["messages"] = told(variables["messages"], tools, template.source, template.wants_parts)
    if not may_be_long:
        model.check_chars(text_chars(variables["messages"]))
    tag = ""
    if chat.continue_final_message:
        tag = unused(strings(variables), 1)
        _leave_open(variables["messages"][-1], tag)
    variables, marks = model.guard.wrap(variables)
    text = template.render(
        {**model.named_tokens, **variables, "add_generation_prompt": chat.add_generation_prompt},
        model.max_output_chars)
    return model.guard.pieces(_cut(text, tag) if tag else text, marks)


def render_pair(model: ChatModel, kwargs_json: bytes, query: str, document: str) -> tuple[list[Piece], list[Piece]]:
    """The pieces of two texts that the model scores together: those up to the document's end, and those behind it."""
    tag = unused((query, document), 1)
    variables: dict[str, Any] = {
        **model.template_defaults, **template_kwargs(kwargs_json), "query": query, "document": document + tag,
        "messages": [{"role": "query", "content": query}, {"role": "document", "content": document + tag}]}
    variables, marks = model.guard.wrap(variables)
    text = model.pair_template.render({**model.named_tokens, **variables, "add_generation_prompt": True},
                                      model.max_output_chars)
    front, shown, back = text.rpartition(tag)
    if not shown:
        raise wrong("The template of this model does not show the document.", "documents")
    return model.guard.pieces(front, marks), model.guard.pieces(back, marks)


def _template(model: ChatModel, chat: Chat, trust: bool, has_tools: bool, has_documents: bool) -> ChatTemplate:
    if chat.template is None:
        return model.template(has_tools, has_documents)
    if not trust:
        raise QuartetError("unsupported_parameter", "This server does not accept a 'chat_template' in a request.",
                           "chat_template")
    return ChatTemplate(chat.template, content_format=model.content_format)


def _leave_open(message: dict[str, Any], tag: str) -> None:
    """Mark where the final message's text ends. The space behind the tag shows whether the template trims contents."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + tag + " "
    elif content:
        content[-1]["text"] += tag + " "
    else:
        raise wrong("The final message has no text that could be continued.")


def _cut(text: str, tag: str) -> str:
    """The prompt up to the end of the final message, without what the template puts behind it."""
    end = text.rfind(tag)
    if end < 0:
        raise wrong("The final message cannot be continued: the chat template does not show it.")
    return text[:end] if text[end + 1:end + 2] == " " else text[:end].rstrip()
