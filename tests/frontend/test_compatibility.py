"""The compatibility page says what the schemas do: nothing of the yardstick is ignored, and nothing is only claimed."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frontend import compatibility
from frontend.bodies import validate
from frontend.compatibility import WHY, YARDSTICK, status
from frontend.fields import NO_EFFECT, REFUSED
from frontend.openapi import FORMS, POSTS
from pipeline.errors import QuartetError

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/rerank": {"query": "x", "documents": ["y"]}, "/score": {"text_1": "x", "text_2": "y"}, "/detokenize": {"tokens": [1]}}
FREE = {"chat_template_kwargs", "request_id", "tools", "vllm_xargs", "prompt"}          # objects, or any text


def test_the_page_is_the_one_that_the_schemas_make() -> None:
    assert PAGE.read_text() == compatibility.page(), "run: python -m frontend.compatibility > docs/compatibility.md"


def test_everything_without_effect_has_a_reason() -> None:
    assert set(WHY) == set(NO_EFFECT)


@pytest.mark.parametrize("path", [*POSTS, *FORMS])
def test_nothing_of_the_yardstick_is_ignored(path: str) -> None:
    assert path in FORMS or any(POSTS[path] == POSTS.get(known) for known in YARDSTICK)
    assert [name for name in YARDSTICK.get(path, ()) if status(path, name)[0] == "unknown"] == []


@pytest.mark.parametrize("path", BODIES)
def test_what_the_page_says_happens(path: str) -> None:
    """Refused fields are refused by name, those without effect are taken whatever they hold, and every honoured one
    rejects a value that makes no sense: it is looked at."""
    [schema] = POSTS[path][1]
    for name in YARDSTICK[path]:
        body = {**BODIES[path], name: [[{"nonsense": object}]]}
        if status(path, name)[0] == "no effect":
            validate(schema, body)
        elif name not in FREE:
            with pytest.raises(QuartetError) as caught:
                validate(schema, body)
            assert caught.value.status == 400 and (caught.value.param or "").startswith(name.split(".")[0]), name
            refused = status(path, name)[0] == "refused"
            assert (caught.value.code == "unsupported_parameter") is refused, name


@pytest.mark.parametrize("path", BODIES)
def test_refused_fields_are_taken_where_they_ask_for_nothing(path: str) -> None:
    [schema] = POSTS[path][1]
    for name in YARDSTICK[path]:
        if status(path, name)[0] == "refused":
            for value in (None, *REFUSED[name]):
                validate(schema, {**BODIES[path], name: value})
