/* Ask a running server from JavaScript: in a browser, or in Node 22 (Node 20: --experimental-websocket).

       htsat serve &
       node examples/client.js examples/street.ogg [http://127.0.0.1:8000]

   A server that wants a token gets the one in HTSAT_TOKEN. A page of another origin needs htsat serve --cors ORIGIN. */

/** What sounds when in a recording: a File, Blob or ArrayBuffer. Asks again when the server is busy. */
async function detect(server, recording, { name = "recording", top = 5, token = null } = {}) {
  const query = new URLSearchParams({ name, top });
  const headers = { "Content-Type": "application/octet-stream" };
  if (token) headers.Authorization = `Bearer ${token}`;
  for (let tries = 0; ; tries++) {
    const response = await fetch(`${server}/v1/detect?${query}`, { method: "POST", headers, body: recording });
    if (response.ok) return response.json();
    if (![429, 503].includes(response.status) || tries === 5) {
      throw new Error((await response.json()).error.message);
    }
    const seconds = Number(response.headers.get("Retry-After") ?? 1);
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  }
}

/** Opens a stream of samples; onMessage gets each message. Resolves to functions that send, and a promise of the end. */
function listen(server, sampleRate, onMessage, { token = null } = {}) {
  const query = new URLSearchParams({ sample_rate: sampleRate, format: "f32le" });
  if (token) query.set("token", token);
  const socket = new WebSocket(`${server.replace(/^http/, "ws")}/v1/stream?${query}`);
  socket.binaryType = "arraybuffer";
  return new Promise((opened, failed) => {
    const finished = new Promise((resolve, reject) => {
      socket.onmessage = ({ data }) => {
        const message = JSON.parse(data);
        if (message.type === "error") reject(new Error(message.message));
        else onMessage(message);
        if (message.type === "end") resolve();
      };
      socket.onclose = (event) => reject(new Error(`the stream was ended (${event.code} ${event.reason})`));
    });
    socket.onerror = () => failed(new Error(`${server}: cannot be reached`));
    socket.onopen = () =>
      opened({
        send: (samples) => socket.send(samples), // a Float32Array of mono samples, -1 to 1
        end: () => socket.send(JSON.stringify({ type: "end" })),
        finished,
      });
  });
}

if (typeof module !== "undefined") {
  module.exports = { detect, listen };
  if (require.main === module) main(...process.argv.slice(2));
}

async function main(path, server = "http://127.0.0.1:8000") {
  const { readFile } = require("node:fs/promises");
  const { basename } = require("node:path");
  const token = process.env.HTSAT_TOKEN ?? null;

  const found = await detect(server, await readFile(path), { name: basename(path), token });
  console.log(`${found.file}: ${found.duration.toFixed(1)} s, heard by ${found.model}`);
  for (const event of found.events) {
    console.log(`  ${event.onset.toFixed(2)} to ${event.offset.toFixed(2)}  ${event.event_label}`);
  }

  // Two seconds of a beep, as a microphone would give it: in short blocks.
  const rate = 48000;
  const stream = await listen(server, rate, (message) => console.log(message.type, message.event_label ?? ""), { token });
  for (let start = 0; start < 2 * rate; start += 4800) {
    stream.send(Float32Array.from({ length: 4800 }, (_, i) => 0.5 * Math.sin((2 * Math.PI * 1000 * (start + i)) / rate)));
  }
  stream.end();
  await stream.finished;
  process.exit(0);
}
