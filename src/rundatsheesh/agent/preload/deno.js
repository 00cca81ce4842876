// Deno: errors are events, which a listener of the program may still take for handled.
const { queueMicrotask } = globalThis;

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
addEventListener("unload", () => write("x", ""));

defineProperty(globalThis, "result", { value: result });
