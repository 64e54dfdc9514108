// What the official JavaScript clients do with a server: `node checks.mjs URL [NAME...]` prints one JSON object,
// by check what is comparable or the error. Greedy, so that two servers with the same model give the same answers.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [url, ...names] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "any", maxRetries: 0 });
const asked = [{ role: "user", content: "hello" }];
const chatOf = { model: "tiny", messages: asked, max_tokens: 6, temperature: 0 };
const responseOf = { model: "tiny", input: "hello", max_output_tokens: 5, temperature: 0 };
const messageOf = { model: "tiny", messages: asked, max_tokens: 6, temperature: 0 };
const schema = { type: "object", properties: { a: { type: "boolean" } }, required: ["a"] };

async function collect(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

// Each type once: a busy engine may put several tokens into one event.
const kinds = (events) => [...new Set(events.map((event) => event.type))];

async function refused(ask) {
  try {
    await ask();
  } catch (error) {
    return [error.constructor.name, error.status];
  }
  throw new Error("not refused");
}

const checks = {
  async chat() {
    const answer = await openai.chat.completions.create(chatOf);
    return [answer.choices[0].message.content, answer.usage.prompt_tokens];
  },
  async chatStream() {
    const chunks = await collect(await openai.chat.completions.create({ ...chatOf, stream: true }));
    return chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join("");
  },
  async tools() {
    const tool = { type: "function", function: { name: "pick", parameters: schema } };
    const tool_choice = { type: "function", function: { name: "pick" } };
    const answer = await openai.chat.completions.create({ ...chatOf, max_tokens: 60, tools: [tool], tool_choice });
    return answer.choices[0].message.tool_calls.map((call) => [call.function.name, call.function.arguments]);
  },
  async structuredOutputs() {
    const response_format = { type: "json_schema", json_schema: { name: "made", schema: { enum: ["x"] } } };
    const answer = await openai.chat.completions.create({ ...chatOf, max_tokens: 20, response_format });
    return answer.choices[0].message.content;
  },
  async logprobs() {
    const answer = await openai.chat.completions.create({ ...chatOf, logprobs: true, top_logprobs: 2 });
    return answer.choices.map((choice) => choice.logprobs.content.map((row) => row.token));
  },
  async completions() {
    const asking = { model: "tiny", prompt: [1, 2, 3], max_tokens: 5, temperature: 0, return_token_ids: true };
    return (await openai.completions.create(asking)).choices[0].token_ids;
  },
  async responses() {
    const first = await openai.responses.create(responseOf);
    const second = await openai.responses.create({ ...responseOf, previous_response_id: first.id });
    const again = await openai.responses.retrieve(first.id);
    return [first.output_text, second.output_text, again.id === first.id];
  },
  async responsesStream() {
    const events = await collect(await openai.responses.create({ ...responseOf, stream: true }));
    return kinds(events);
  },
  async background() {
    const asking = { ...responseOf, max_output_tokens: 1500, background: true, ignore_eos: true };
    const response = await openai.responses.create(asking);
    const cancelled = await openai.responses.cancel(response.id);
    return [response.status, cancelled.status, (await openai.responses.retrieve(response.id)).status];
  },
  async models() {
    return (await openai.models.list()).data.map((model) => model.id);
  },
  async errors() {
    const create = (fields) => () => openai.chat.completions.create({ ...chatOf, ...fields });
    return [
      await refused(create({ model: "none" })),
      await refused(create({ max_tokens: 100000 })),
      await refused(() => openai.responses.retrieve("resp_none")),
    ];
  },
  async abort() {
    const stream = await openai.chat.completions.create({ ...chatOf, max_tokens: 1500, ignore_eos: true, stream: true });
    for await (const _ of stream) break;
    return stream.controller.signal.aborted;
  },
  async message() {
    const answer = await anthropic.messages.create({ ...messageOf, system: "be brief" });
    return [answer.content[0].text, answer.stop_reason];
  },
  async messageStream() {
    const stream = anthropic.messages.stream(messageOf);
    const passed = kinds(await collect(stream));
    return [passed, (await stream.finalMessage()).content[0].text];
  },
  async messageTools() {
    const tools = [{ name: "pick", input_schema: schema }];
    const answer = await anthropic.messages.create({ ...messageOf, tools, tool_choice: { type: "any" } });
    return answer.content.map((block) => block.type);
  },
  async countedTokens() {
    return (await anthropic.messages.countTokens({ model: "tiny", messages: asked })).input_tokens;
  },
  async messageErrors() {
    const create = (fields) => () => anthropic.messages.create({ ...messageOf, ...fields });
    return [await refused(create({ model: "none" })), await refused(create({ max_tokens: 4000 }))];
  },
};

const results = {};
for (const name of names.length ? names : Object.keys(checks)) {
  try {
    results[name] = await checks[name]();
  } catch (error) {
    results[name] = { error: String(error) };
  }
}
console.log(JSON.stringify(results));
