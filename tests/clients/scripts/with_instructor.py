"""instructor: pydantic models through tools and through JSON schemas, and a stream of partial ones."""
import json
import os

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=150)


ASK = [{"role": "user", "content": "Extract: Alice is 31 years old."}]
found = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(
        OpenAI(base_url=os.environ["QUARTET_URL"] + "/v1", api_key="none", max_retries=0), mode=mode)
    person = client.chat.completions.create(
        model=os.environ["QUARTET_MODEL"], messages=ASK, response_model=Person, max_retries=0, temperature=0, max_tokens=200)
    *_, last = client.chat.completions.create_partial(
        model=os.environ["QUARTET_MODEL"], messages=ASK, response_model=Person, max_retries=0, temperature=0, max_tokens=200)
    found[mode.value] = [person.model_dump(), last.model_dump()]
print(json.dumps(found))
