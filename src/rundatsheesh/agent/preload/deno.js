// Deno: the way out is the channel that a parent process opens for a Node.js child. It needs no permission.
import process from "node:process";

const channel = process.channel;
const send = process.send;
const { setTimeout, queueMicrotask } = globalThis;
const { unrefTimer } = Deno;
// Bytes of results that may be on their way at once, so that together with a last one the socket holds them all and an
// exit loses none. One result of LIMIT takes at most twice its size, when every character needs a backslash.
const BUDGET = 2 * LIMIT + (1 << 18);

// The program has no parent to talk to: it finds no channel, and listening for messages does not keep it alive.
let posting = false;
channel.unref();
channel.refCounted = () => {};
for (const key of ["send", "channel", "disconnect"]) delete process[key];
defineProperty(process, "connected", { configurable: true, get: () => posting || undefined }); // send() asks for it

let budget = BUDGET;
let waiting = null; // the latest result, when the program makes more of them than can be sent
let scheduled = false;

function post(letter, json) {
  posting = true;
  apply(send, process, [letter + json]);
  posting = false;
}

function flush() {
  if (waiting !== null) post("r", waiting);
  waiting = null;
}

function renew() {
  scheduled = false;
  budget = BUDGET;
  flush();
}

function write(letter, json) {
  flush();
  post(letter, json);
}

function writeResult(json, bytes) {
  waiting = json;
  if (2 * bytes <= budget) {
    budget -= 2 * bytes;
    flush();
  }
  if (scheduled || budget > BUDGET / 2) return;
  scheduled = true;
  unrefTimer(setTimeout(renew, 0));
}

function failed() {
  if (!Deno.exitCode) Deno.exitCode = 1;
}

function uncaught(event, error) {
  write("u", describe(error));
  // Not reached when the program ends for it.
  queueMicrotask(() => event.defaultPrevented && write("h", ""));
}

addEventListener("error", (event) => uncaught(event, event.error));
addEventListener("unhandledrejection", (event) => uncaught(event, event.reason));
addEventListener("unload", () => {
  budget = Infinity;
  write("x", "");
});

defineProperty(globalThis, "result", { value: result });
