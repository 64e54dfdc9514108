// What the official JavaScript clients make of streams that end with an error: `node broken_streams.mjs URL` prints one
// JSON object, by kind of stream the number of events before the error and its text.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const url = process.argv[2];
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "any", maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const message = { model: "tiny", messages, max_tokens: 6 };

const streams = {
  chat: () => openai.chat.completions.create({ model: "tiny", messages, stream: true }),
  completions: () => openai.completions.create({ model: "tiny", prompt: "a", stream: true }),
  messages: () => anthropic.messages.create({ ...message, stream: true }),
  messagesHelper: () => anthropic.messages.stream(message),
};

const results = {};
for (const [name, open] of Object.entries(streams)) {
  let events = 0;
  try {
    for await (const _ of await open()) events += 1;
    results[name] = [events, "no error"];
  } catch (error) {
    results[name] = [events, String(error)];
  }
}
console.log(JSON.stringify(results));
