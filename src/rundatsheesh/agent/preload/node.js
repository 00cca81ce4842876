// Node.js: the way out is a socket, written at once.
import { writeSync } from "node:fs";
import { createRequire } from "node:module";
import process from "node:process";

const CHANNEL = 3;
const { listenerCount, on } = process;
const { hasUncaughtExceptionCaptureCallback } = process;

function write(letter, json) {
  const bytes = apply(encode, encoder, [stringify(letter + json) + "\n"]);
  for (let at = 0; at < bytes.length;) at += writeSync(CHANNEL, bytes, at, bytes.length - at);
}

const writeResult = (json) => write("r", json);

function failed() {
  if (!process.exitCode) process.exitCode = 1;
}

apply(on, process, ["uncaughtExceptionMonitor", (error) => {
  const handled = apply(listenerCount, process, ["uncaughtException"]) > 0 || hasUncaughtExceptionCaptureCallback();
  if (!handled) write("u", describe(error));
}]);
apply(on, process, ["exit", () => write("x", "")]);

// A program given as text may be a script, where `var result` is this very property: it shadows it, as in a module.
defineProperty(globalThis, "result", {
  configurable: true,
  get: () => result,
  set: (value) => defineProperty(globalThis, "result", { configurable: true, enumerable: true, writable: true, value }),
});

// Text with top-level await is a module, which has no `require`; people write both in one.
if (FROM_CODE) {
  const require = createRequire(`${process.cwd()}/`);
  defineProperty(globalThis, "require", { configurable: true, writable: true, value: require });
}
