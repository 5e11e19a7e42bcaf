"""What each family's models write, and what it means. Shared by the tests of the parsers, the detokenizer and the API."""
from __future__ import annotations

import json
from dataclasses import dataclass, field

from pipeline.families.parts import Part, cut
from pipeline.families.table import AnswerParser

SIGNATURES = {
    "get_weather": {"city": "string", "days": "integer"}, "now": {},
    "save": {"text": "string", "tags": "array", "options": "object", "ratio": "number", "note": "string|null"}}
CITY = {"city": "Zürich \"West\" \\ 東京 🌍\n", "days": 3}
CITY_JSON = json.dumps(CITY, ensure_ascii=False)
SAVE = {"text": "a\n</parameter x>\nb", "tags": ["x", 1, None], "options": {"deep": [{"er": True}]}, "ratio": -2.5e-3,
        "note": None}


@dataclass(frozen=True)
class Answer:
    """An answer as a client sees it."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()  # name, arguments as text


@dataclass(frozen=True)
class Sample:
    family: str
    text: str
    calls: tuple[tuple[str, object], ...]    # name, arguments as a value
    content: str = ""
    reasoning: str = ""
    reasoning_family: str = field(default="")


def _call(name: str, arguments: object, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


_TWO = (("get_weather", CITY), ("now", {}))
_ONE = (("get_weather", CITY),)
_DS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
SAMPLES = [
    Sample("hermes", f'On it.\n<tool_call>\n{_call("get_weather", CITY)}\n</tool_call>\n'
                     f'<tool_call>\n{_call("now", {})}\n</tool_call>', _TWO, "On it."),
    Sample("hermes", f'<tool_call>{{"arguments": {CITY_JSON}, "name": "get_weather"}}}}</tool_call>', _ONE),
    Sample("hermes", '<tool_call>{"name": "now"}</tool_call>', (("now", {}),)),
    Sample("hermes", f'<tool_call>{_call("get_weather", CITY_JSON)}</tool_call>\nDone.', _ONE, "\nDone."),
    Sample("hermes", f' \n{_call("get_weather", CITY)}\n', _ONE),
    Sample("granite", f'<|tool_call|>[{_call("get_weather", CITY)}, {_call("now", {})}]', _TWO),
    Sample("granite", f'<tool_call>[{_call("now", {})}]', (("now", {}),)),
    Sample("llama3_json", _call("get_weather", CITY, "parameters"), _ONE),
    Sample("llama3_json", f'<|python_tag|>{_call("get_weather", CITY, "parameters")}; {_call("now", {})}', _TWO),
    Sample("llama3_json", '{"type": "function", "function": ' + _call("now", {}, "parameters") + "}", (("now", {}),)),
    Sample("mistral", f'[TOOL_CALLS] [{_call("get_weather", CITY)}, {_call("now", {})}]', _TWO),
    Sample("mistral", f"Sure.[TOOL_CALLS]get_weather{CITY_JSON}[TOOL_CALLS]now{{}}", _TWO, "Sure."),
    Sample("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{CITY_JSON}[TOOL_CALLS]now[ARGS]{{}}", _TWO),
    Sample("phi4_mini_json", f'functools[{_call("get_weather", CITY)}, {_call("now", {})}]', _TWO),
    Sample("phi4_mini_json", f'<|tool_call|>[{_call("now", {})}]<|/tool_call|>', (("now", {}),)),
    Sample("pythonic", f"[get_weather(city={CITY['city']!r}, days=3), now()]", _TWO),
    Sample("pythonic", "<|python_start|>[save(text='''', tags=(1, 'x',), options={'a': [True, None]})]<|python_end|>"
           .replace("''''", "'it\\'s \\u00e9'"),
           (("save", {"text": "it's é", "tags": [1, "x"], "options": {"a": [True, None]}}),)),
    Sample("qwen3_coder", "Saving.\n\n<tool_call>\n<function=save>\n" + "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in SAVE.items()) + "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        (("save", SAVE), ("now", {})), "Saving."),
    Sample("glm45", "\n<tool_call>save\n" + "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value if isinstance(value, str) else json.dumps(value)}</arg_value>\n"
        for key, value in SAVE.items()) + "</tool_call>\n<tool_call>now\n</tool_call>", (("save", SAVE), ("now", {}))),
    Sample("deepseek_v3", f"Hm.\n{_DS[0]}{_DS[1]}function{_DS[2]}get_weather\n```json\n{CITY_JSON}\n```{_DS[3]}\n"
           f"{_DS[1]}function{_DS[2]}now\n```json\n{{}}\n```{_DS[3]}{_DS[4]}", _TWO, "Hm."),
    Sample("deepseek_v31", f"{_DS[0]}{_DS[1]}get_weather{_DS[2]}{CITY_JSON}{_DS[3]}{_DS[1]}now{_DS[2]}{{}}{_DS[3]}{_DS[4]}",
           _TWO),
    Sample("kimi_k2", "Yes.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
           f"<|tool_call_argument_begin|>{CITY_JSON}<|tool_call_end|><|tool_call_begin|>functions.now:1"
           "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>", _TWO, "Yes."),
    Sample("openai", "<|channel|>analysis<|message|>Which city?<|end|><|start|>assistant<|channel|>commentary"
           f" to=functions.get_weather <|constrain|>json<|message|>{CITY_JSON}<|call|>", _ONE, "", "Which city?",
           "openai_gptoss"),
    Sample("openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.now<|channel|>commentary"
           " json<|message|><|call|>", (("now", {}),), "", "Hm.", "openai_gptoss"),
    Sample("openai", "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant<|channel|>final<|message|>"
           "Done.", (), "I will look.Done.", "", "openai_gptoss"),
    Sample("json", f'[{_call("get_weather", CITY, "parameters")}, {_call("now", {}, "parameters")}]', _TWO),
    Sample("json", _call("get_weather", CITY), _ONE),
    Sample("hermes", f'<think>\nLet me think.\n</think>\n\n<tool_call>\n{_call("now", {})}\n</tool_call>',
           (("now", {}),), "", "Let me think.", "qwen3"),
]


def parse(family: str, pieces: list[str], reasoning: str = "", tail: str = "", max_calls: int = 0) -> Answer:
    """The answer that `pieces`, pushed one after the other, give."""
    parser = AnswerParser(family, reasoning, SIGNATURES, max_calls, tail)
    for piece in pieces:
        parser.push(piece)
    parser.end()
    "".join(parser.parts.texts).encode()                 # what goes over the wire is characters
    return answer(*parser.parts.take())


def answer(text: str, spans: list[tuple[int, int]]) -> Answer:
    told = {Part.CONTENT: "", Part.REASONING: ""}
    calls: list[list[str]] = []
    for kind, piece in cut(text, spans):
        if kind == Part.CALL:
            calls.append([piece, ""])
        elif kind == Part.ARGUMENTS:
            calls[-1][1] += piece
        else:
            told[Part(kind)] += piece
    return Answer(told[Part.CONTENT], told[Part.REASONING], tuple((name, text) for name, text in calls))
