// The openai package of Node: answers, streams, their helpers, tools, structured answers, errors, and an abort.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.env.QUARTET_URL + "/v1", apiKey: "none", maxRetries: 0 });
const model = process.env.QUARTET_MODEL;
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ask = { model, messages, temperature: 0, max_tokens: 96 };

const { data: answer, response } = await client.chat.completions.create(ask).withResponse();
let streamed = "", usage = null;
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const helped = await client.chat.completions.stream(ask).finalContent();
const text = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 5, temperature: 0 });
const tools = [{ type: "function", function: { name: "weather", description: "The weather.", parameters: {
  type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false } } }];
const forced = { ...ask, tools, tool_choice: { type: "function", function: { name: "weather" } } };
const called = await client.chat.completions.create(forced);
const calledStream = await client.chat.completions.stream(forced).finalMessage();
const City = z.object({ name: z.string(), country: z.string() });
const parsed = await client.chat.completions.parse({ ...ask, response_format: zodResponseFormat(City, "city") });
let error = null;
try {
  await client.chat.completions.create({ ...ask, temperature: 9 });
} catch (raised) {
  error = [raised.constructor.name, raised.status, raised.param, raised.code];
}
const controller = new AbortController();
let seen = 0;
try {
  const long = await client.chat.completions.create(
    { model, messages, stream: true, max_tokens: 1000, ignore_eos: true }, { signal: controller.signal });
  for await (const _ of long) if (++seen === 3) controller.abort();
} catch (raised) {
  if (!(raised instanceof OpenAI.APIUserAbortError)) throw raised;
}
const models = [];
for await (const m of client.models.list()) models.push(m.id);
console.log(JSON.stringify({
  text: answer.choices[0].message.content, id: response.headers.get("x-request-id"), streamed, usage, helped,
  completion: text.choices[0].text, call: called.choices[0].message.tool_calls,
  streamedCall: calledStream.tool_calls, parsed: parsed.choices[0].message.parsed, error, seen, models }));
