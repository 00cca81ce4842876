"""What `result` carries, under the real Deno and the real Node.js."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from script_harness import ABSENT, Scripts, make_scripts

from rundatsheesh.manager.guest_output import MAX_DEPTH
from server_support import scale

BOTH = pytest.mark.parametrize("language", ["ts", "js"])


@pytest.fixture(params=["at the call", "ahead of it"])
def scripts(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripts:
    return make_scripts(tmp_path, monkeypatch, ahead=request.param == "ahead of it")


VALUES: dict[str, tuple[str, Any]] = {
    "object": ("{ok: true, answer: 42}", {"ok": True, "answer": 42}),
    "null": ("null", None),
    "undefined": ("undefined", None),
    "nothing": ("", None),
    "function": ("() => 1", None),
    "false": ("false", False),
    "zero": ("0", 0),
    "negative zero": ("-0", 0),
    "not a number": ("[NaN, Infinity]", [None, None]),
    "empty string": ("''", ""),
    "text": ("'grüße 日本 \\u{1F600} \\u0000 \\n \"quoted\" \\\\'", 'grüße 日本 \U0001f600 \x00 \n "quoted" \\'),
    "lone surrogate": ("'\\ud800'", "\ufffd"),
    "big integer": ("{n: 2n ** 70n, list: [1n]}", {"n": "1180591620717411303424", "list": ["1"]}),
    "bare big integer": ("7n", "7"),
    "members without JSON": ("{a: undefined, b() {}, c: Symbol('c'), d: [undefined]}", {"d": [None]}),
    "date": ("new Date(0)", "1970-01-01T00:00:00.000Z"),
    "toJSON": ("{toJSON: () => ({me: 1n})}", {"me": "1"}),
    "map": ("new Map([['a', 1], [2, new Map([['__proto__', 3]])]])", {"a": 1, "2": {"__proto__": 3}}),
    "map of objects": ("new Map([[{k: 1}, 1n]])", [[{"k": 1}, "1"]]),
    "set": ("new Set([1, 'a', new Set()])", [1, "a", []]),
    "error inside": ("{e: new TypeError('bad')}", {"e": {"name": "TypeError", "message": "bad"}}),
    "cycle": ("(() => { const a = {n: 1}; a.self = a; a.deep = {a: [a]}; return a; })()",
              {"n": 1, "self": "[Circular]", "deep": {"a": ["[Circular]"]}}),
    "cycle in a map": ("(() => { const m = new Map(); m.set('m', m); return m; })()", {"m": "[Circular]"}),
    "cycle in a list": ("(() => { const l = []; l[0] = l; return l; })()", ["[Circular]"]),
    "shared, not a cycle": ("(() => { const s = {x: [1]}; return {a: s, b: s, c: [s, {s}]}; })()",
                            {"a": {"x": [1]}, "b": {"x": [1]}, "c": [{"x": [1]}, {"s": {"x": [1]}}]}),
    "null prototype": ("Object.assign(Object.create(null), {a: 1})", {"a": 1}),
    "a key called __proto__": ("JSON.parse('{\"__proto__\": 1}')", {"__proto__": 1}),
    "boxed": ("[Object(1), Object('s'), Object(false)]", [1, "s", False]),
}  # fmt: skip


@BOTH
def test_values_arrive_as_json(scripts: Scripts, language: str) -> None:
    """All in one program each, to start the interpreter once: the text of `result.set` is the same for each value."""
    names = list(VALUES)
    for name in names[:4]:  # at top level, one by one
        got = scripts.run(language, f"result.set({VALUES[name][0]})")
        assert (got.exit_code, got.result, got.error) == (0, VALUES[name][1], ABSENT), name
    inside = ", ".join(f"() => ({VALUES[name][0] or 'undefined'})" for name in names)
    code = f"result.set([{inside}].map((make) => {{ const v = make(); return v === undefined ? null : v; }}))"
    got = scripts.run(language, code)
    assert got.error is ABSENT
    for name, value in zip(names, got.result, strict=True):
        assert value == VALUES[name][1], name


@BOTH
def test_the_last_one_counts_and_is_kept_as_it_was(scripts: Scripts, language: str) -> None:
    code = "const o = {n: 1}; result.set('first'); result.set(o); o.n = 2; setTimeout(() => console.log('done'), 20)"
    got = scripts.run(language, code)
    assert (got.result, got.stdout, got.stderr, got.exit_code) == ({"n": 1}, "done\n", "", 0)


@BOTH
def test_no_call_no_result(scripts: Scripts, language: str) -> None:
    got = scripts.run(language, "console.log('{\"result\": 1}')")
    assert (got.exit_code, got.result, got.error) == (0, ABSENT, ABSENT)


@BOTH
@pytest.mark.parametrize(
    ("thrown", "expected"),
    [
        ("new TypeError('bad')", {"name": "TypeError", "message": "bad"}),
        ("'just text'", {"name": "Error", "message": "just text"}),
        ("{code: 7, why: [1n]}", {"code": 7, "why": ["1"]}),
        ("null", {"name": "Error", "message": "null"}),
        ("undefined", {"name": "Error", "message": "undefined"}),
        ("Symbol('s')", {"name": "Error", "message": "Symbol(s)"}),
        ("42", {"name": "Error", "message": "42"}),
        ("new (class Mine extends Error { name = 'Mine'; })('own')", {"name": "Mine", "message": "own"}),
        ("new DOMException('aborted', 'AbortError')", {"name": "AbortError", "message": "aborted"}),
        ("Object.assign(new Error('x'), {stack: undefined, cause: 1})", {"name": "Error", "message": "x"}),
    ],
)
def test_errors_reported_and_uncaught_look_alike(scripts: Scripts, language: str, thrown: str, expected: Any) -> None:
    reported = scripts.run(language, f"result.error({thrown}); console.log('goes on')")
    assert (reported.exit_code, reported.stdout) == (1, "goes on\n")
    uncaught = scripts.run(language, f"throw {thrown}")
    assert uncaught.exit_code == 1
    for error in (reported.error, uncaught.error):
        stack = error.pop("stack", "")
        assert error == expected
        assert "data:" not in stack and "rundatsheesh" not in stack


@BOTH
@pytest.mark.parametrize(
    "code",
    [
        "setTimeout(() => { throw new RangeError('late') }, 5)",
        "Promise.reject(new RangeError('late'))",
        "await 1; throw new RangeError('late')",
        "(async () => { await null; throw new RangeError('late') })()",
    ],
)
def test_uncaught_errors_of_all_origins(scripts: Scripts, language: str, code: str) -> None:
    got = scripts.run(language, f"result.set('before'); {code}")
    assert got.error["name"] == "RangeError" and got.error["message"] == "late" and "late" in got.error["stack"]
    assert (got.exit_code, got.result) == (1, "before")
    assert "late" in got.stderr


def test_handled_errors_are_none(scripts: Scripts) -> None:
    deno = """
        addEventListener("error", (e) => e.preventDefault());
        addEventListener("unhandledrejection", (e) => e.preventDefault());
        Promise.reject(new Error("rejected")); setTimeout(() => { throw new Error("thrown") }, 5);
        setTimeout(() => console.log("alive"), 50)"""
    node = """
        process.on("uncaughtException", () => {}); process.on("unhandledRejection", () => {});
        Promise.reject(new Error("rejected")); setTimeout(() => { throw new Error("thrown") }, 5);
        setTimeout(() => console.log("alive"), 50)"""
    for language, code in (("ts", deno), ("js", node), ("ts", "import process from 'node:process';" + node)):
        got = scripts.run(language, code)
        assert (got.exit_code, got.stdout, got.error) == (0, "alive\n", ABSENT)


@BOTH
def test_a_reported_error_outlives_other_ends(scripts: Scripts, language: str) -> None:
    leave = "Deno.exit(%d)" if language == "ts" else "process.exit(%d)"
    got = scripts.run(language, f"result.set(1); result.error('first'); result.error('mine'); {leave % 5}")
    assert (got.exit_code, got.result, got.error) == (5, 1, {"name": "Error", "message": "mine"})
    got = scripts.run(language, "result.error('mine'); throw new Error('other')")
    assert (got.exit_code, got.error["message"]) == (1, "mine")


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("const x: number = ;", "SyntaxError", "Expression expected"),
        ("import './missing.ts'", "Error", 'Module not found "file:///'),
        ("import {nothing} from 'node:fs'; nothing()", "SyntaxError", "nothing"),
        ("import 'https://example.com/x.ts'", "Error", "https://example.com/x.ts"),
        ("await import('./missing.ts')", "TypeError", 'Module not found "file:///'),
        ("await import('./broken.ts')", "TypeError", "SyntaxError: Expression expected"),
    ],
)
def test_programs_that_deno_cannot_load(scripts: Scripts, code: str, name: str, message: str) -> None:
    (scripts.workspace / "broken.ts").write_text("}")
    got = scripts.run("ts", code)
    assert (got.exit_code, got.result, got.error["name"]) == (1, ABSENT, name)
    assert message in got.error["message"]


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("const x = ;", "SyntaxError", "Unexpected token"),
        ("await 1; const x = ;", "SyntaxError", ""),
        ("import './missing.js'", "Error", "Cannot find module"),
        ("require('./missing')", "Error", "Cannot find module './missing'"),
        ("import {nothing} from 'fs'", "SyntaxError", "nothing"),
        ("await import('./missing.js')", "Error", "Cannot find module"),
    ],
)
def test_programs_that_node_cannot_load(scripts: Scripts, code: str, name: str, message: str) -> None:
    got = scripts.run("js", code)
    assert (got.exit_code, got.result, got.error["name"]) == (1, ABSENT, name)
    assert message in got.error["message"]


@BOTH
@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("'text'", {"name": "Error", "message": "text"}),
        ("{ a: 1 }", {"a": 1}),
        ("7", {"name": "Error", "message": "7"}),
    ],
)
def test_a_rejection_without_an_error(scripts: Scripts, language: str, reason: str, error: dict[str, Any]) -> None:
    got = scripts.run(language, f"Promise.reject({reason})")
    assert (got.exit_code, got.error) == (1, error)


def test_node_s_own_listeners_decide_about_rejections(scripts: Scripts) -> None:
    got = scripts.run("js", "process.on('unhandledRejection', (r) => console.log(r)); Promise.reject('caught')")
    assert (got.exit_code, got.stdout, got.error) == (0, "caught\n", ABSENT)


@BOTH
def test_size_limits(scripts: Scripts, language: str) -> None:
    most = (2 << 20) - 2  # the quotes
    got = scripts.run(language, f"result.set('x'.repeat({most})); console.log('ok')")
    assert (got.stdout, len(got.result)) == ("ok\n", most)
    got = scripts.run(language, f"result.set('kept'); result.set('x'.repeat({most} + 1))")
    assert (got.exit_code, got.result, got.error["name"]) == (1, "kept", "RangeError")
    assert "limit is 2097152" in got.error["message"]
    got = scripts.run(language, "try { result.set('日'.repeat(1 << 20)) } catch (e) { console.log(e.message) }")
    assert got.stdout.startswith("The result is 3145730 bytes of JSON") and got.result is ABSENT
    got = scripts.run(language, "result.set('x'.repeat(2000))", max_output=1024)
    assert got.error["name"] == "RangeError"
    got = scripts.run(language, "result.error(new Error('m'.repeat(1e6)))")
    assert (got.error["name"], len(got.error["message"])) == ("Error", 65537)
    got = scripts.run(language, "result.error({big: 'm'.repeat(3e6)})")
    assert got.error == {"name": "RangeError", "message": "The error is larger than 2097152 bytes"}


NESTED = "let v = 1; for (let i = 0; i < {levels}; i++) v = i % 2 ? {{v}} : [v];"


@BOTH
def test_a_limit_of_depth(scripts: Scripts, language: str) -> None:
    got = scripts.run(language, f"{NESTED.format(levels=MAX_DEPTH)} result.set(v)")
    assert (got.exit_code, got.error) == (0, ABSENT) and got.result is not ABSENT
    got = scripts.run(language, f"{NESTED.format(levels=MAX_DEPTH + 1)} result.set('kept'); result.set(v)")
    assert (got.exit_code, got.result, got.error["name"]) == (1, "kept", "RangeError")
    assert got.error["message"] == "The value is nested deeper than the limit of 200"
    assert "toJson" not in got.error["stack"]
    got = scripts.run(language, f"{NESTED.format(levels=50_000)} result.error(v)")
    assert got.exit_code == 1 and "limit of 200" in got.error["message"]


@BOTH
def test_large_results_survive_an_immediate_exit(scripts: Scripts, language: str) -> None:
    """Escaped they are twice as large; many in one turn; then the process is gone at once."""
    leave = "Deno.exit(4)" if language == "ts" else "process.exit(4)"
    worst = "'\"'.repeat((1 << 19) - 2)"
    got = scripts.run(language, f"for (let i = 0; i < 20; i++) result.set(i + {worst}); {leave}")
    assert got.exit_code == 4 and got.result.startswith("19") and len(got.result) == (1 << 19)


@BOTH
def test_very_many_results(scripts: Scripts, language: str) -> None:
    leave = "Deno.exit(4)" if language == "ts" else "process.exit(4)"
    got = scripts.run(language, f"for (let i = 0; i < 5000; i++) result.set(i); {leave}")
    assert (got.exit_code, got.result) == (4, 4999)


def test_results_of_many_turns_and_a_crash(scripts: Scripts) -> None:
    code = """
        const wait = () => new Promise(setTimeout);
        for (let i = 0; i < 30; i++) { result.set([i, "x".repeat(5e5)]); if (i % 7 == 0) await wait(); }
        result.set([99, "x".repeat(9e5)]);
        throw new Error("end");"""
    got = scripts.run("ts", code)
    assert (got.result[0], got.error["message"]) == (99, "end")


@BOTH
def test_a_result_before_a_timeout_is_kept(scripts: Scripts, language: str) -> None:
    got = scripts.run(language, "result.set('in time'); for (;;);", timeout=scale(1))
    assert (got.exit_code, got.result, got.error) == (124, "in time", ABSENT)


@BOTH
def test_a_getter_that_throws_is_the_programs_own_error(scripts: Scripts, language: str) -> None:
    got = scripts.run(language, "result.set({get bad() { throw new URIError('from the getter') }})")
    assert (got.exit_code, got.result, got.error["name"]) == (1, ABSENT, "URIError")
    got = scripts.run(
        language, "result.error({get bad() { throw new URIError('from the getter') }}); console.log('on')"
    )
    assert (got.stdout, got.exit_code) == ("on\n", 1) and "from the getter" in got.error["message"]
    hostile = "class E extends Error { get name() { throw 1 } get message() { throw 2 } get stack() { throw 3 } }"
    got = scripts.run(language, f"{hostile}; result.error(new E())")
    assert (got.error["name"], got.error["message"]) == ("Error", "")


@BOTH
def test_changed_builtins_change_nothing(scripts: Scripts, language: str) -> None:
    code = """
        JSON.stringify = () => "forged"; JSON.parse = null; String.prototype.toWellFormed = () => "forged";
        Map.prototype.forEach = Set.prototype.forEach = () => {}; Array.isArray = () => false;
        Reflect.apply = () => {}; Object.defineProperty = Object.create = Object.freeze = () => {};
        TextEncoder.prototype.encode = () => new Uint8Array(); globalThis.setTimeout = globalThis.queueMicrotask = null;
        globalThis.Error = globalThis.RangeError = globalThis.Map = function () {};
        Array.prototype.push = Function.prototype.call = Function.prototype.apply = Function.prototype.bind = null;
        typeof Deno === "undefined" && Object.assign(process, {send() {}, emit() {}});
        result.set({m: new (Object.getPrototypeOf(new Set()).constructor)([1]), list: ["a"], n: 1n});
        result.error(new TypeError("real"));"""
    got = scripts.run(language, code)
    assert got.result == {"m": [1], "list": ["a"], "n": "1"}
    assert (got.error["name"], got.error["message"]) == ("TypeError", "real")


def test_result_cannot_be_replaced_by_accident(scripts: Scripts) -> None:
    got = scripts.run("ts", "try { globalThis.result = 1 } catch (e) { console.log(e.name) } result.set('still')")
    assert (got.stdout, got.result) == ("TypeError\n", "still")
    for language in ("ts", "js"):
        got = scripts.run(language, "try { result.set = null } catch (e) { console.log(e.name) } result.set('still')")
        assert got.result == "still"
        for keyword in ("const", "let", "var"):  # a name that everybody uses
            got = scripts.run(language, f"{keyword} result = 5; console.log(result + 1)")
            assert (got.exit_code, got.stdout, got.error) == (0, "6\n", ABSENT), (language, keyword)


def test_the_channel_is_hidden(scripts: Scripts) -> None:
    code = """
        import process from "node:process";
        process.on("message", () => {}); process.on("disconnect", () => {});
        console.log(process.send, process.channel, process.connected, process.disconnect);
        console.log(globalThis.process.send);
        console.log((await new Deno.Command("env").output()).success);
        result.set(new TextDecoder().decode((await new Deno.Command("env").output()).stdout).includes("_FD"));"""
    got = scripts.run("ts", code, flags=["--allow-run"])
    assert got.stdout == "undefined undefined undefined undefined\nundefined\ntrue\n"
    assert (got.exit_code, got.result) == (0, False)
    got = scripts.run("js", "process.on('message', () => {}); console.log(process.send, process.channel)")
    assert (got.exit_code, got.stdout) == (0, "undefined undefined\n")


def test_garbage_on_the_channel_spoils_nothing_else(scripts: Scripts) -> None:
    code = """
        const fs = require("fs"); result.set("good");
        fs.writeSync(3, '\\n{"not": "ours"}\\n"zunknown"\\n[[[\\n"r"');
        fs.writeSync(3, "x".repeat(3e6)); fs.writeSync(3, "\\n");
        fs.writeSync(3, "[".repeat(2e5) + "\\n"); fs.writeSync(3, Buffer.from([255, 254, 10]));
        result.error({mine: 1});"""
    got = scripts.run("js", code)
    assert (got.result, got.error) == ("good", {"mine": 1})


@BOTH
def test_twenty_at_once_never_mix(scripts: Scripts, language: str) -> None:
    args = "Deno.args" if language == "ts" else "process.argv.slice(2)"
    code = f"""
        const [me] = {args}; result.set({{me, pad: me.repeat(1000)}}); await new Promise((r) => setTimeout(r, 30));
        console.log(me); if (me % 2) result.error(me)"""
    with ThreadPoolExecutor(20) as pool:
        runs = list(pool.map(lambda n: scripts.run(language, code, args=[str(n)]), range(20)))
    for number, got in enumerate(runs):
        me = str(number)
        assert (got.result, got.stdout) == ({"me": me, "pad": me * 1000}, f"{me}\n")
        assert got.error == ({"name": "Error", "message": me} if number % 2 else ABSENT)
