// Calls openai-node as its users do, and tells in JSON what it returned or raised: one file for 4, 6 and 7.
//
// Each line of standard input is one call (tests/support/official_clients.py writes them), each line of standard output what
// came of it. OPENAI_FROM is the folder with the library's node_modules.
import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";

const load = createRequire(join(process.env.OPENAI_FROM, "index.js"));
const openai = load("openai");
const OpenAI = openai.OpenAI ?? openai.default;
const major = Number(load("openai/version").VERSION.split(".")[0]);
// what the library itself would use: 4 brings its own, later ones take the platform's
const fetch = major < 5 ? load("node-fetch") : globalThis.fetch;
const HEADERS = ["x-stainless-retry-count", "idempotency-key"];

// an event as soon as the library gives it out, and in the end how the call went
function write(line) {
  process.stdout.write(JSON.stringify(line) + "\n");
}

async function tell(call) {
  const began = performance.now();
  const told = { attempts: [] };
  const seconds = () => (performance.now() - began) / 1000;
  const options = { baseURL: call.base_url, apiKey: call.api_key };
  if ("max_retries" in call) options.maxRetries = call.max_retries;
  if ("timeout" in call) options.timeout = call.timeout * 1000;
  options.fetch = async (url, init) => {
    const reply = await fetch(url, init);
    const given = new Headers(init.headers);
    const sent = Object.fromEntries(HEADERS.map((name) => [name, given.get(name)]));
    told.attempts.push({ status: reply.status, headers: Object.fromEntries(reply.headers), sent, seconds: seconds() });
    return reply;
  };
  try {
    const reply = await begin(new OpenAI(options), call);
    if (call.arguments.stream) {
      // 4 knows nothing of image events: it hands on the event's name and data
      for await (const event of reply) write({ event: major < 5 ? event.data : event });
    } else {
      told.result = reply?.body?.object === "list" ? reply.body : reply;
      told.request_id = reply?._request_id ?? null;
    }
  } catch (error) {
    told.raised = raised(error);
  }
  told.seconds = seconds();
  return told;
}

async function begin(client, call) {
  const given = {};
  for (const [name, value] of Object.entries(call.arguments)) given[name] = await fileOrValue(value);
  const body = { ...given, ...call.extensions };
  const options = { headers: call.headers };
  // nor does it look for `stream` in what is sent
  if (major < 5 && given.stream) options.stream = true;
  switch (call.scenario) {
    case "generate":
      return client.images.generate(body, options);
    case "edit":
      return client.images.edit(body, options);
    case "variation":
      return client.images.createVariation(body, options);
    case "models":
      return client.models.list();
    case "model":
      return client.models.retrieve(given.model);
    // what the library has no method for, with its own transport, errors and retries
    case "get":
      return client.get(given.path, options);
    case "post":
      return client.post(given.path, { body: given.body, ...options });
    default:
      throw new Error(`no scenario ${call.scenario}`);
  }
}

// `{"base64": …, "name": …, "type": …}` is a file; so are those in lists
async function fileOrValue(value) {
  if (Array.isArray(value)) return Promise.all(value.map(fileOrValue));
  if (value === null || typeof value !== "object" || !("base64" in value)) return value;
  return openai.toFile(Buffer.from(value.base64, "base64"), value.name ?? "picture", { type: value.type });
}

function raised(error) {
  const classes = [];
  for (let kind = error; kind && kind !== Object.prototype; kind = Object.getPrototypeOf(kind)) {
    if (Object.hasOwn(kind, "constructor")) classes.push(kind.constructor.name);
  }
  return {
    classes,
    message: String(error?.message ?? error),
    status: error?.status ?? null,
    request_id: error?.requestID ?? error?.request_id ?? null,
    code: error?.code ?? null,
    param: error?.param ?? null,
    type: error?.type ?? null,
  };
}

for await (const line of createInterface({ input: process.stdin })) {
  write({ told: await tell(JSON.parse(line)) });
}
