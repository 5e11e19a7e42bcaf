"""langchain-openai: an answer, a stream with usage, a bound tool, a structured answer."""
import json
import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return "sunny"


class City(BaseModel):
    """A city and its country."""

    name: str
    country: str


model = ChatOpenAI(model=os.environ["QUARTET_MODEL"], base_url=os.environ["QUARTET_URL"] + "/v1", api_key="none",
                   temperature=0, max_tokens=96, max_retries=0, stream_usage=True)
answer = model.invoke("What is the capital of France?")
chunks = list(model.stream("What is the capital of France?"))
whole = chunks[0]
for chunk in chunks[1:]:
    whole += chunk
called = model.bind_tools([weather], tool_choice="weather").invoke("What is the weather in Paris?")
city = model.with_structured_output(City, method="json_schema").invoke("Name a city in France.")
print(json.dumps({
    "text": answer.content, "usage": answer.usage_metadata, "streamed": whole.content, "chunks": len(chunks),
    "stream_usage": whole.usage_metadata, "calls": called.tool_calls, "city": city.model_dump()}, default=str))
