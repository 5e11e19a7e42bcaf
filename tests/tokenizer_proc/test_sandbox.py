"""Chat templates are somebody else's programs: they see their data, stay small, end in time, and fail alone."""
from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

import pytest

from pipeline.errors import QuartetError
from tokenizer_proc.limits import DeadlinePassed, TooLarge, gathered, weigh, within
from tokenizer_proc.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]
DOUBLE = "{% set ns = namespace(v=START) %}{% for i in range(60) %}{% set ns.v = STEP %}{% endfor %}{{ ns.v }}"


def render(source: str, seconds: float = 2.0, **variables: Any) -> str:
    return ChatTemplate(source, seconds).render({"messages": MESSAGES, **variables}, 1000)


def error(source: str, seconds: float = 2.0) -> QuartetError:
    with pytest.raises(QuartetError) as caught:
        render(source, seconds)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_request", "messages")
    return caught.value


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'] }}", "{{ namespace.__init__.__globals__ }}",
    "{{ dict.mro() }}", "{{ self._TemplateReference__context.environment.finalize }}",
    "{{ '{0.__class__.__mro__}'.format('a') }}", "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ('%s' | format)('a').__class__.mro() }}", "{{ 'a' | attr('__class__') }}", "{{ {} | xmlattr }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ lipsum.__globals__['os'] }}",
    "{{ joiner() }}", "{{ get_flashed_messages() }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{{ namespace(__class__=1) }}",
    "{{ messages.append(1) }}", "{{ messages.pop() }}", "{{ messages[0].update({'role': 'system'}) }}",
    "{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{% extends 'x' %}",
    "{{ messages | map('upper') }}", "{{ namespace }}", "{{ raise_exception }}", "{{ range(3).__class__.mro() }}",
    "{{ 'a'.encode('utf-8') }}", "{{ ('a' * 3).__reduce_ex__(2) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_templates_reach_nothing_but_their_data(source: str) -> None:
    assert "0x" not in error(source).message


BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**10 }}", "{{ 10**10 * 'a' }}", "{{ ['a'] * 10**9 }}", "{{ [['a'] * 1000] * 10**6 }}",
    "{{ 'x' | center(10**9) }}", "{{ 'x'.center(10**9) }}", "{{ 'x'.ljust(10**9) }}", "{{ 'x'.rjust(10**9) }}",
    "{{ '1'.zfill(10**9) }}", "{{ '\t'.expandtabs(10**9) }}",
    "{{ ('a\n' * 10**5) | indent(900) }}",
    "{{ 10 ** (10 ** 8) }}", "{{ 5 | round(-10**9) }}", "{{ 5 | round(10**9, 'floor') }}",
    "{{ '%1000000000d' % 3 }}", "{{ '%*d' % (10**9, 3) }}", "{{ '%.1000000000f' % 3 }}", "{{ '%99999d' | format(3) }}",
    "{{ '{:1000000000}'.format(3) }}", "{{ '{:{w}}'.format(3, w=10**9) }}", "{{ '{0:>99999}'.format_map({'0': 1}) }}",
    "{{ ('%s' * 1000) % (('a' * 10**6,) * 1000) }}", "{{ ('{0}' * 10**5).format('a' * 10**6) }}",
    "{{ ('a' * 10**5).replace('a', 'b' * 1000) }}", "{{ ('a' * 10**5) | replace('', 'b' * 1000) }}",
    "{{ ['a' * 10**6] * 1000 }}", "{{ ('a,' * 10**6).split(',') | join('b' * 1000) }}",
    "{{ ('b' * 10**6).join('a' * 1000) }}",
    "{{ [1] | tojson(indent=10**9) }}", "{{ range(100000) | list * 100 }}", "{{ strftime_now('%Y' * 10**6) }}",
    "{{ ('&' * 10**6) | e | e | e | e | e }}", "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
    DOUBLE.replace("START", "'aaaa'").replace("STEP", "ns.v ~ ns.v"),
    DOUBLE.replace("START", "'aaaa'").replace("STEP", "ns.v + ns.v"),
    DOUBLE.replace("START", "'aaaa'").replace("STEP", "ns.v * 2"),
    DOUBLE.replace("START", "3").replace("STEP", "ns.v * ns.v"),
    DOUBLE.replace("START", "[]").replace("STEP", "[ns.v, ns.v]"),
    DOUBLE.replace("START", "()").replace("STEP", "(ns.v, ns.v)"),
    DOUBLE.replace("START", "{}").replace("STEP", "{'a': ns.v, 'b': ns.v}"),
    DOUBLE.replace("START", "{}").replace("STEP", "dict(a=ns.v, b=ns.v)"),
    DOUBLE.replace("START", "[1]").replace("STEP", "[ns.v, ns.v] | sum(start=[])"),
    "{% set ns = namespace(v='aaaa') %}"
    "{% for i in range(60) %}{% set ns.v %}{{ ns.v }}{{ ns.v }}{% endset %}{% endfor %}",
    "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns = namespace(v='aaaa') %}"
    "{% for i in range(60) %}{% set ns.v = m(ns.v) %}{% endfor %}",
    "{% macro m() %}{{ varargs }}{% endmacro %}{% set s = 'a' * 10**6 %}{{ m(s, s, s, s, s, s, s, s) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
]


@pytest.mark.parametrize("source", BOMBS)
def test_what_would_grow_or_recurse_without_end_is_refused_before_it_does(source: str) -> None:
    """None of these lives off the deadline: it is set too far away to be what ends them."""
    error(source, seconds=60.0)


@pytest.mark.parametrize("source", [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{{ range(100000) | map('string') | select('in', range(100000) | list) | list | length }}",
])
def test_endless_loops_end_at_the_deadline(source: str) -> None:
    started = time.monotonic()
    assert error(source, seconds=0.2).message == "The chat template took longer than 0.2 s."
    assert time.monotonic() - started < 5.0   # generous: a loaded machine; without the deadline these take hours


def test_a_failure_leaves_the_next_rendering_untouched() -> None:
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}ok", 0.1)
    for n, expected in ((0, "ok"), (100_000, None), (0, "ok"), (3, "ok")):
        if expected is None:
            with pytest.raises(QuartetError):
                template.render({"n": n}, 1000)
        else:
            assert template.render({"n": n}, 1000) == expected


def test_the_templates_own_refusal_reaches_the_user_capped() -> None:
    assert error("{{ raise_exception('Roles must alternate') }}").message == "Roles must alternate"
    assert error("{{ raise_exception('x' * 5000) }}").message == "x" * 300


def test_other_failures_show_nothing_of_their_insides() -> None:
    assert error("{{ messages[7].content.secret }}").message == (
        "The chat template of this model cannot render these messages.")
    assert error("a\n{% if %}").message == "The chat template has a syntax error in line 2."


# ---- what templates may do ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("source", "text"), [
    ("{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'] }}]\n  {% endif %}\n{% endfor %}",
     "[hi]\n"),
    ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}"
     "{{ i }}{% endfor %}", "02"),
    ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
    ("{{ {'b': '<é&\"', 'a': [1, none, true]} | tojson }}", '{"b": "<é&\\"", "a": [1, null, true]}'),
    ("{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}", '{\n  "a": [\n    2\n  ],\n  "b": 1\n}'),
    ("{{ 'é' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}", '"\\u00e9"[1,2]'),
    ("{% set ns = namespace(found=false, n=0) %}{% set ns.n = ns.n + 2 %}{{ ns.n }}{{ ns.found }}", "2False"),
    ("{{ missing }}{{ missing is defined }}{{ messages[0].name is not defined }}", "FalseTrue"),
    ("{{ '  a b '.strip().split(' ')[-1] }}{{ 'xay'.replace('a', 'b') }}{{ 'abc'[::-1] }}", "bxbycba"),
    ("{{ ' a ' | trim }}{{ ['a', 'b'] | join(', ') }}{{ messages | length }}{{ 'x' in 'xy' }}", "aa, b1True"),
    ("{{ '%s-%03d' % ('a', 7) }}{{ '{:>3}{}'.format('a', 1) }}{{ '%s' | format('z') }}", "a-007  a1z"),
    ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}", "['hi']"),
    ("{% macro m(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ m(1) }}{{ m(x=3, y=4) }}", "1234"),
    ("{% for k, v in {'a': 1}.items() %}{{ loop.index0 }}{{ k }}{{ v }}{{ loop.last }}{% endfor %}", "0a1True"),
    ("{{ [3, 1] | sort }}{{ [1, 2] | sum }}{{ 2.567 | round(1) }}{{ 'ab' | upper }}{{ 'a\nb' | indent(2) }}",
     "[1, 3]32.6ABa\n  b"),
    ("{% set x = messages[1:] + [{'role': 'a'}] %}{{ x | length }}{{ (x + x)[0].role }}", "1a"),
])
def test_everything_that_chat_templates_use_works(source: str, text: str) -> None:
    assert render(source) == text


def test_the_clock_is_the_only_thing_a_template_sees_of_the_world() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


@pytest.mark.parametrize(("source", "parts"), [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
    ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", True),
    ("{% for m in messages %}{% for p in m['content'] %}{% endfor %}{% endfor %}", True),
    ("{% for m in messages[1:] %}{% if m.content is string %}a{% else %}{% for p in m.content %}{% endfor %}{% endif %}"
     "{% endfor %}", True),
    ("{% for m in messages %}{% set content = m.content %}{% for p in content %}{% endfor %}{% endfor %}", True),
    ("{% for m in messages %}{% set z = m.content | list %}{% for p in z %}{% endfor %}{% endfor %}", True),
    ("{% macro show(c) %}{% for p in c %}{% endfor %}{% endmacro %}{{ show(messages[0].content) }}", True),
    ("{% macro show(c) %}{% for p in c %}{% endfor %}{% endmacro %}{{ show(c=messages[0].content) }}", True),
    ("{% macro show(content) %}{% for p in content %}{% endfor %}{% endmacro %}{{ show(tools) }}", False),
    ("{% for m in messages %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{{ m.content }}{% endfor %}", False),
    ("{% for m in messages | selectattr('content') %}{% endfor %}", False),
])
def test_the_content_format_is_read_from_the_template(source: str, parts: bool) -> None:
    assert ChatTemplate(source).wants_parts is parts


# ---- limits ------------------------------------------------------------------------------------------------------

def test_a_value_weighs_what_it_contains_as_often_as_it_contains_it() -> None:
    text = "a" * 100
    assert weigh(text, 100) == 100 and weigh([text] * 3, 1000) == 348
    nested: Any = []
    for _ in range(100):
        nested = [nested, nested]
    for value in (text + "a", [text], nested, {text: 1}, {1: text}.values(), [1 << 10_000]):
        with pytest.raises(TooLarge):
            weigh(value, 100)
    with pytest.raises(TooLarge):
        gathered(("ab" for _ in iter(int, 1)), 1000)      # an endless generator


def test_a_deadline_interrupts_and_puts_the_signal_handler_back() -> None:
    before = signal.getsignal(signal.SIGALRM)

    def forever() -> None:
        while True:
            pass
    with pytest.raises(DeadlinePassed):
        within(0.05, forever)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert within(5.0, lambda: 3) == 3


def test_a_deadline_that_a_destructor_swallowed_strikes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn:
        def __del__(self) -> None:
            end = time.monotonic() + 0.1
            while time.monotonic() < end:
                pass

    def work() -> None:
        Stubborn()
        while True:
            pass
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with pytest.raises(DeadlinePassed):
        within(0.02, work)


def test_outside_of_the_main_thread_work_runs_without_a_deadline() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(within(0.001, lambda: sum(range(100_000)))))
    thread.start()
    thread.join()
    assert results == [4999950000]
