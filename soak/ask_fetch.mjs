// Asks for one picture with Node's own fetch, and tells what came of it as one line of JSON.
const [url, key, model, prompt] = process.argv.slice(2);
const begun = performance.now();
const seconds = () => (performance.now() - begun) / 1000;
const told = { status: 0, first_seconds: 0, picture: "", error: "" };
try {
  const reply = await fetch(`${url}/v1/images/generations`, {
    method: "POST",
    headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
    body: JSON.stringify({ model, prompt, size: "32x32", response_format: "b64_json" }),
  });
  told.status = reply.status;
  told.first_seconds = seconds();
  told.picture = (await reply.json()).data[0].b64_json;
} catch (error) {
  told.error = `${error.message} (${error.cause?.code ?? error.cause?.message ?? "no cause"})`;
}
console.log(JSON.stringify({ ...told, seconds: seconds() }));
