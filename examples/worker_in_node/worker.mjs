// A worker in JavaScript: answers `img_serving.v1` with flat colours that the words and the seed choose.
//
//   npm ci && node worker.mjs 50051
//
// The gateway's side: protocol = "grpc", endpoints = ["http://localhost:50051"].
import { createHash } from "node:crypto";
import { deflateSync, crc32 } from "node:zlib";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const path = (name) => fileURLToPath(new URL(name, import.meta.url));
const read = (name) => grpc.loadPackageDefinition(loader.loadSync(path(name), { longs: String, keepCase: true }));
const { ImageGeneration } = read("../../proto/img_serving/v1/generation.proto").img_serving.v1;
const { Health } = read("./health.proto").grpc.health.v1;

const MIB = 1024 * 1024;
const STEPS = 10;
const MODEL = {
  id: "flat",
  max_batch_size: 4,
  honours: ["seed", "size", "num_inference_steps"],
  sizes: { multiple: 1, min_side: 1, max_side: 2048 },
  default_width: 512,
  default_height: 512,
  formats: ["png"],
};

const chunk = (kind, body) => {
  const head = Buffer.alloc(8);
  head.writeUInt32BE(body.length);
  head.write(kind, 4);
  const crc = Buffer.alloc(4);
  crc.writeUInt32BE(crc32(Buffer.concat([head.subarray(4), body])) >>> 0);
  return Buffer.concat([head, body, crc]);
};

/** A PNG of one colour. */
const draw = (prompt, seed, width, height) => {
  const colour = createHash("sha256").update(`${seed} ${prompt}`).digest().subarray(0, 3);
  const row = Buffer.concat([Buffer.from([0]), Buffer.alloc(width * 3, colour)]);
  const header = Buffer.from([0, 0, 0, 0, 0, 0, 0, 0, 8, 2, 0, 0, 0]);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  const pixels = deflateSync(Buffer.alloc(row.length * height, row));
  const signature = Buffer.from("89504e470d0a1a0a", "hex");
  return Buffer.concat([signature, chunk("IHDR", header), chunk("IDAT", pixels), chunk("IEND", Buffer.alloc(0))]);
};

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

const generate = async (call) => {
  const { items, width, height, steps } = call.request;
  const refuse = (code, details, param) => {
    const trailers = new grpc.Metadata();
    trailers.set("img-serving-param", param);
    call.emit("error", { code, details, metadata: trailers });
  };
  if (items.length === 0 || items.length > MODEL.max_batch_size)
    return refuse(grpc.status.INVALID_ARGUMENT, `a batch has 1 to ${MODEL.max_batch_size} items`, "items");
  if (!(width >= 1 && height >= 1 && Math.max(width, height) <= MODEL.sizes.max_side))
    return refuse(grpc.status.INVALID_ARGUMENT, `sides are from 1 to ${MODEL.sizes.max_side} pixels`, "size");
  call.sendMetadata(new grpc.Metadata()); // taken: a gateway that loses the connection now does not draw it twice unasked

  const total = steps ?? STEPS;
  for (let done = 1; done <= total; done++) {
    await pause(5); // here a step would be computed
    if (call.cancelled) return; // nobody wants it any more
    call.write({ progress: { done, total } });
  }
  items.forEach((item, index) => {
    const data = draw(item.prompt, item.seed, width, height);
    const picture = { index, media_type: "image/png", size_bytes: data.length, data: data.subarray(0, MIB) };
    call.write({ picture });
    for (let at = MIB; at < data.length; at += MIB) call.write({ chunk: { index, data: data.subarray(at, at + MIB) } });
  });
  call.write({ done: {} });
  call.end();
};

const server = new grpc.Server({ "grpc.max_receive_message_length": 256 * MIB });
server.addService(ImageGeneration.service, {
  Generate: (call) => generate(call).catch((error) => call.emit("error", { code: grpc.status.INTERNAL, details: error.name })),
  Capabilities: (call, reply) => reply(null, { name: "a worker in node", version: "1", models: [MODEL], slots: 1 }),
});
server.addService(Health.service, { Check: (call, reply) => reply(null, { status: "SERVING" }) });
server.bindAsync(`127.0.0.1:${process.argv[2] ?? 50051}`, grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) throw error;
  console.log(`listening on ${port}`);
});
process.on("SIGTERM", () => server.tryShutdown(() => process.exit(0)));
