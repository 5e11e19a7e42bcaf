"""The tool-call families: one description each, and which of them a chat template speaks.

Data that every stage shares: the command line chooses a family once (`ModelConfig.tool_parser`, `.reasoning_parser`),
the frontend checks requests and writes deltas, the detokenizer parses. How calls are demanded: pipeline.families.forced.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipeline.families import harmony
from pipeline.families.calls import CallParser, Machine, Signatures
from pipeline.families.json_calls import Granite, Hermes, JsonList, Llama3, Mistral, Phi4Mini
from pipeline.families.parts import Parts
from pipeline.families.python_calls import Pythonic
from pipeline.families.reasoning import REASONINGS, ReasoningParser
from pipeline.families.token_calls import DeepSeekV3, DeepSeekV31, KimiK2
from pipeline.families.xml_calls import Glm45, Qwen3Coder

HARMONY, HARMONY_REASONING = "openai", "openai_gptoss"
GENERIC = "json"                             # the family of models that have none
MAX_TAIL = 16                                # prompt ids in which the tag that ends a prompt is found


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One format of tool calls."""

    name: str
    parser: type[CallParser]
    template: tuple[tuple[str, ...], ...] = ()   # a template of the family holds all words of one of these groups
    tokens: tuple[str, ...] = ()             # control tokens that the parser must see
    typed: bool = False                      # arguments are bare text: the parser needs the types of parameters
    ids: str = "call"                        # form of the calls' ids: call | mistral (9 letters) | kimi (functions.N:0)


# The order is the order of detection.
FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in (
    Family(name=HARMONY, parser=harmony.Harmony, template=(("<|channel|>", "<|message|>"),), tokens=harmony.TOKENS),
    Family(name="kimi_k2", parser=KimiK2, template=(("<|tool_calls_section_begin|>",),), ids="kimi",
           tokens=(*KimiK2.markers, *KimiK2.closers, KimiK2.separator)),
    Family(name="deepseek_v3", parser=DeepSeekV3, template=(("<｜tool▁sep｜>", "```json"),),
           tokens=(*DeepSeekV3.markers, *DeepSeekV3.closers, DeepSeekV3.separator)),
    Family(name="deepseek_v31", parser=DeepSeekV31, template=(("<｜tool▁sep｜>",),),
           tokens=(*DeepSeekV31.markers, *DeepSeekV31.closers, DeepSeekV31.separator)),
    Family(name="mistral", parser=Mistral, template=(("[TOOL_CALLS]",),), ids="mistral",
           tokens=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")),
    Family(name="phi4_mini_json", parser=Phi4Mini, template=(("functools",), ("<|tool|>", "<|/tool|>")),
           tokens=("<|tool_call|>", "<|/tool_call|>")),
    Family(name="qwen3_coder", parser=Qwen3Coder, template=(("<function=", "<parameter="),), typed=True,
           tokens=("<tool_call>", "</tool_call>")),
    Family(name="glm45", parser=Glm45, template=(("<arg_key>", "<arg_value>"),), typed=True,
           tokens=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")),
    Family(name="granite", parser=Granite, template=(("<|tool_call|>",),), tokens=("<|tool_call|>",)),
    Family(name="hermes", parser=Hermes, template=(("<tool_call>",),), tokens=("<tool_call>", "</tool_call>")),
    Family(name="pythonic", parser=Pythonic, template=(("<|python_start|>",), ("[func_name1(",)),
           tokens=("<|python_start|>", "<|python_end|>")),
    Family(name="llama3_json", parser=Llama3, template=(("<|python_tag|>",), ('"parameters": ', "tools")),
           tokens=("<|python_tag|>",)),
    Family(name=GENERIC, parser=JsonList),
)})
# Names that users of other servers know.
TOOL_ALIASES = MappingProxyType({
    "deepseek_v31_json": "deepseek_v31", "glm47": "glm45", "llama4_json": "llama3_json", "llama4_pythonic": "pythonic",
    "qwen3_json": "hermes", "qwen3_xml": "qwen3_coder"})
REASONING_ALIASES = MappingProxyType({
    "deepseek_v3": "think", "glm45": "think", "gpt_oss": HARMONY_REASONING, "kimi_k2": "think",
    "openai": HARMONY_REASONING})


def family_of(template: str) -> str:
    """The tool-call family that a chat template speaks; GENERIC where none is known."""
    return next((name for name, family in FAMILIES.items()
                 if any(all(word in template for word in group) for group in family.template)), GENERIC)


def reasoning_of(template: str) -> str:
    """The reasoning family that a chat template speaks; "" where it has none."""
    return next((name for name, reasoning in REASONINGS.items()
                 if all(word in template for word in reasoning.template)), "")


def tool_parser(text: str) -> str:
    """The value of --tool-call-parser; ValueError with the rest of "... must be ..."."""
    name = TOOL_ALIASES.get(text, text)
    if name not in ("auto", "none", *FAMILIES):
        raise ValueError("auto, none or one of " + ", ".join(FAMILIES))
    return name


def reasoning_parser(text: str) -> str:
    """The value of --reasoning-parser; ValueError with the rest of "... must be ..."."""
    name = REASONING_ALIASES.get(text, text)
    if name not in ("auto", "none", *REASONINGS):
        raise ValueError("auto, none or one of " + ", ".join(REASONINGS))
    return name


def marker_tokens(tool_parser: str, reasoning_parser: str) -> frozenset[str]:
    """Tokens that must be visible to the parsers although users never see special tokens."""
    tokens: set[str] = set()
    if tool_parser:
        tokens.update(FAMILIES[tool_parser].tokens)
    if reasoning_parser == HARMONY_REASONING:
        tokens.update(harmony.TOKENS)
    elif reasoning_parser:
        tokens.update((*REASONINGS[reasoning_parser].openers, *REASONINGS[reasoning_parser].closers))
    return frozenset(tokens)


class AnswerParser:
    """Everything that is parsed in one choice: reasoning, then calls. `thinking`: the next character is reasoning."""

    __slots__ = ("parts", "_first", "_calls", "_thinker")

    def __init__(self, tool_parser: str, reasoning_parser: str, signatures: Signatures, max_calls: int,
                 prompt_tail: str) -> None:
        """`prompt_tail`: text that the prompt ends with, control tokens included."""
        self.parts = Parts()
        self._calls: CallParser | None = None
        self._thinker: ReasoningParser | harmony.Harmony | None = None
        self._first: Machine
        if HARMONY_REASONING == reasoning_parser or HARMONY == tool_parser:
            self._first = self._calls = self._thinker = harmony.Harmony(
                self.parts, signatures, max_calls, tools=bool(tool_parser), reasoning=bool(reasoning_parser))
            return
        if tool_parser:
            self._first = self._calls = FAMILIES[tool_parser].parser(self.parts, signatures, max_calls)
        if reasoning_parser:
            self._first = self._thinker = ReasoningParser(
                self.parts, REASONINGS[reasoning_parser], prompt_tail, self._calls)
        assert tool_parser or reasoning_parser

    def push(self, text: str) -> None:
        self._first.push(text)

    def end(self) -> None:
        self._first.end()

    @property
    def thinking(self) -> bool:
        return self._thinker is not None and self._thinker.thinking

    @property
    def in_call(self) -> bool:
        """The last call is not complete."""
        return self._calls is not None and self._calls.in_call

    @property
    def done(self) -> bool:
        """There are as many calls as there may be: what follows is of no use."""
        return self._calls is not None and self._calls.done
