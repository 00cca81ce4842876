// Node.js: the monitor sees every error that nobody catches, and does not count as catching it.
import { writeSync } from "node:fs";
import { createRequire } from "node:module";
import process from "node:process";

const { emit, listenerCount, on, hasUncaughtExceptionCaptureCallback } = process;

const put = (bytes, at) => writeSync(CHANNEL, bytes, at, bytes.length - at);

function failed() {
  if (!process.exitCode) process.exitCode = 1;
}

// The monitor is told of a rejection with anything but an Error by an Error of Node's own, which only quotes it. Node
// has announced it before as what it is; a listener would count as handling it.
let rejection;
defineProperty(process, "emit", {
  configurable: true,
  writable: true,
  value: function (event, reason) {
    if (event === "unhandledRejection") rejection = { reason };
    return apply(emit, this, arguments);
  },
});

apply(on, process, ["uncaughtExceptionMonitor", (error, origin) => {
  const thrown = origin === "unhandledRejection" && rejection ? rejection.reason : error;
  rejection = undefined;
  const handled = apply(listenerCount, process, ["uncaughtException"]) > 0 || hasUncaughtExceptionCaptureCallback();
  if (!handled) write("u", describe(thrown));
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
