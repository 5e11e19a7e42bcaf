// The ai package with @ai-sdk/openai-compatible: text, a stream, a tool that is run, an object.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const quartet = createOpenAICompatible({
  name: "quartet", baseURL: process.env.QUARTET_URL + "/v1", apiKey: "none", includeUsage: true, supportsStructuredOutputs: true });
const model = quartet(process.env.QUARTET_MODEL);
const common = { model, temperature: 0, maxOutputTokens: 96, maxRetries: 0 };
const prompt = "What is the capital of France?";

const answer = await generateText({ ...common, prompt });
const stream = streamText({ ...common, prompt });
let streamed = "";
for await (const part of stream.textStream) streamed += part;
const usage = await stream.usage;
const run = [];
const weather = tool({ description: "The weather.", inputSchema: z.object({ city: z.string() }),
  execute: async (input) => { run.push(input); return { degrees: 18 }; } });
const called = await generateText({ ...common, prompt, tools: { weather }, toolChoice: { type: "tool", toolName: "weather" } });
const calledStream = streamText({ ...common, prompt, tools: { weather }, toolChoice: "required" });
await calledStream.consumeStream();
const object = await generateObject({ ...common, prompt: "Name a city in France.",
  schema: z.object({ name: z.string(), country: z.string() }) });
console.log(JSON.stringify({
  text: answer.text, tokens: answer.usage.outputTokens, finish: answer.finishReason, streamed, streamTokens: usage.outputTokens,
  calls: called.toolCalls.map((c) => [c.toolName, c.input]), streamCalls: (await calledStream.toolCalls).map((c) => c.toolName),
  run: run.length, object: object.object }));
