// The openai package of Node against a server: an answer, its stream, a forced call, an error, an abort.
const { default: OpenAI } = await import(process.env.OPENAI_PACKAGE);
const client = new OpenAI({ baseURL: process.env.QUARTET_URL + "/v1", apiKey: "none", maxRetries: 0 });
const ask = { model: "smollm2", messages: [{ role: "user", content: "What is the capital of France?" }], temperature: 0, max_tokens: 16 };

const answer = await client.chat.completions.create(ask);
const helped = await client.chat.completions.stream({ ...ask, stream_options: { include_usage: true } }).finalChatCompletion();
const tools = [{ type: "function", function: { name: "weather", parameters: {
  type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false } } }];
const called = await client.chat.completions.stream(
  { ...ask, max_tokens: 60, tools, tool_choice: { type: "function", function: { name: "weather" } } }).finalMessage();
let error = null;
try {
  await client.chat.completions.create({ ...ask, temperature: 9 });
} catch (raised) {
  error = [raised.constructor.name, raised.status, raised.param, raised.code];
}
let seen = 0;
try {
  const long = await client.chat.completions.create({ ...ask, stream: true, max_tokens: 1000, ignore_eos: true });
  for await (const _ of long) if (++seen === 3) long.controller.abort();
} catch (raised) {
  if (!(raised instanceof OpenAI.APIUserAbortError)) throw raised;
}
console.log(JSON.stringify({
  text: answer.choices[0].message.content, usage: answer.usage, helped: helped.choices[0].message.content,
  helpedUsage: helped.usage, calls: called.tool_calls, error, seen }));
