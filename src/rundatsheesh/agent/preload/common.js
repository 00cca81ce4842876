// The global `result` of run-ts and run-js. Runs before the user's program, which may change any built-in afterwards,
// so everything needed later is taken here. One module with what precedes it (const LIMIT: bytes of JSON that `result`
// may carry; const CHANNEL: the descriptor that leads out; const FROM_CODE: whether the program is given as text) and
// with deno.js or node.js, which follows it and defines put(bytes, at), a write(2) that tells how much went, and failed().
//
// What goes out is a line of JSON, a string: a letter, then JSON text. r: the result. e: the error that the program
// reported. u: an error that nobody caught. h: somebody did catch that one. x: the program has come to its end.

const { apply } = Reflect;
const { stringify } = JSON;
const { create, defineProperty, freeze } = Object;
const { isArray } = Array;
const [ErrorClass, RangeErrorClass, MapClass, SetClass, StringOf] = [Error, RangeError, Map, Set, String];
const { captureStackTrace } = Error;
const [forEachOfMap, forEachOfSet] = [Map.prototype.forEach, Set.prototype.forEach];
const { slice, toWellFormed } = String.prototype;
const { encode } = TextEncoder.prototype;
const encoder = new TextEncoder();
const MAX_TEXT = 1 << 16; // characters of an error's message, and of its stack
const MAX_DEPTH = 200; // of nested arrays and objects; the host believes no more (manager/guest_output.py)

const cut = (text) => (text.length > MAX_TEXT ? apply(slice, text, [0, MAX_TEXT]) + "…" : text);
const byteLength = (text) => apply(encode, encoder, [text]).length;

// Returns when the other end has it or the socket holds it, so that no exit loses it.
function write(letter, json) {
  const bytes = apply(encode, encoder, [stringify(letter + json) + "\n"]);
  for (let at = 0; at < bytes.length;) at += put(bytes, at);
}

function fromMap(map) {
  const object = create(null);
  const pairs = [];
  let named = true;
  apply(forEachOfMap, map, [(value, key) => {
    named = named && (typeof key === "string" || typeof key === "number");
    if (named) object[key] = value;
    pairs[pairs.length] = [key, value];
  }]);
  return named ? object : pairs;
}

function fromSet(set) {
  const values = [];
  apply(forEachOfSet, set, [(value) => {
    values[values.length] = value;
  }]);
  return values;
}

// What JSON has no word for, in words that it has.
function plain(item) {
  if (isArray(item)) return item;
  if (item instanceof MapClass) return fromMap(item);
  if (item instanceof SetClass) return fromSet(item);
  if (item instanceof ErrorClass) return { name: StringOf(item.name), message: StringOf(item.message) };
  return item;
}

// Throws a RangeError that begins where the program called `set`.
function refuse(message) {
  const error = new RangeErrorClass(message);
  captureStackTrace(error, result.set);
  throw error;
}

// JSON text, or undefined where JSON.stringify says so. Only an object inside itself is a cycle, not one met twice.
function toJson(value) {
  const above = []; // the objects around the item, as the program knows them
  const shown = []; // the same, as JSON.stringify walks them
  let depth = 0;
  function replace(_key, item) {
    while (depth > 0 && shown[depth - 1] !== this) depth--;
    if (typeof item === "bigint") return StringOf(item);
    if (typeof item === "string") return apply(toWellFormed, item, []);
    if (typeof item !== "object" || item === null) return item;
    for (let i = 0; i < depth; i++) if (above[i] === item) return "[Circular]";
    if (depth === MAX_DEPTH) refuse(`The value is nested deeper than the limit of ${MAX_DEPTH}`);
    above[depth] = item;
    shown[depth] = plain(item);
    return shown[depth++];
  }
  return stringify(value, replace);
}

function read(error, key, otherwise) {
  try {
    const value = error[key];
    return value === undefined ? otherwise : cut(StringOf(value));
  } catch {
    return otherwise;
  }
}

// JSON text of at most LIMIT bytes: without the stack, or with the beginning of the message, when it must be.
function describeError(error) {
  const name = read(error, "name", "Error");
  const message = read(error, "message", "");
  const forms = [{ name, message, stack: read(error, "stack") }, { name, message }];
  for (let i = 0; i < 2; i++) {
    const json = toJson(forms[i]);
    if (byteLength(json) <= LIMIT) return json;
  }
  return toJson({ name: "Error", message: apply(slice, message, [0, LIMIT / 16]) });
}

// JSON text for anything that can be thrown; never throws itself.
function describe(error) {
  try {
    if (error instanceof ErrorClass) return describeError(error);
    if (typeof error !== "object" || error === null) return describeError({ message: StringOf(error) });
    const json = toJson(error) ?? "null";
    if (byteLength(json) <= LIMIT) return json;
    return describeError({ name: "RangeError", message: `The error is larger than ${LIMIT} bytes` });
  } catch (reason) {
    return describeError({ message: `The error cannot be turned into JSON: ${read(reason, "message", "unknown")}` });
  }
}

const result = freeze({
  __proto__: null,
  // Returns `value` to the caller; the last one counts.
  set(value) {
    const json = toJson(value) ?? "null";
    const size = json.length > LIMIT ? json.length : byteLength(json);
    if (size > LIMIT) refuse(`The result is ${size} bytes of JSON, the limit is ${LIMIT}`);
    write("r", json);
  },
  // Returns `error` to the caller and lets the program end with an exit code other than 0. The program goes on.
  error(error) {
    failed();
    write("e", describe(error));
  },
});
