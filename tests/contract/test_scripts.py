"""TypeScript under Deno, JavaScript under Node.js: results, errors, permissions, sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server_support import Box, tgz

NewVm = Callable[..., Box]
LANGUAGES = ["ts", "js"]


def run(box: Box, language: str, code: str, **more: Any) -> dict[str, Any]:
    return box.ts(code, **more) if language == "ts" else box.js(code, **more)


@pytest.mark.parametrize("language", LANGUAGES)
def test_result_set(box: Box, language: str) -> None:
    assert run(box, language, "result.set({ a: [1, 'x', null] }); console.log('out')")["result"] == {
        "a": [1, "x", None]
    }
    assert "result" not in run(box, language, "console.log(1)")


@pytest.mark.parametrize("language", LANGUAGES)
def test_any_json_value_and_the_last_one_wins(box: Box, language: str) -> None:
    for value in (None, True, 0, "", [], {}, "ünï\u0000\n", {"deep": [[[{"x": 1.5}]]]}):
        done = run(box, language, f"result.set('first'); result.set({json.dumps(value)})")
        assert "result" in done and done["result"] == value, done
    odd = "const loop = {}; loop.self = loop; result.set({ big: 10n ** 20n, loop })"
    assert run(box, language, odd)["result"] == {"big": "1" + "0" * 20, "loop": {"self": "[Circular]"}}


@pytest.mark.parametrize("language", LANGUAGES)
def test_large_results_arrive_whole(box: Box, language: str) -> None:
    done = run(box, language, "result.set('x'.repeat(1_000_000))")
    assert done.get("result") == "x" * 1_000_000, str(done)[:500]


@pytest.mark.parametrize("language", LANGUAGES)
def test_results_beyond_the_limit_of_output_are_an_error_that_says_so(box: Box, language: str) -> None:
    done = run(box, language, "result.set('x'.repeat((2 << 20) - 2))")
    assert len(done["result"]) == (2 << 20) - 2
    done = run(box, language, "result.set('x'.repeat(2 << 20))")
    assert done["exitCode"] != 0 and "result" not in done
    assert "2097152" in str(done["error"]), str(done)[:500]


@pytest.mark.parametrize("language", LANGUAGES)
def test_results_nested_too_deep_are_an_error_that_says_so(box: Box, language: str) -> None:
    nested = "let v = 1; for (let i = 0; i < {}; i++) v = [v]; result.set(v)"
    deepest = run(box, language, nested.format(200))
    assert deepest["exitCode"] == 0 and str(deepest["result"]) == "[" * 200 + "1" + "]" * 200
    done = run(box, language, nested.format(201))
    assert done["exitCode"] != 0 and "result" not in done
    assert "200" in done["error"]["message"], done["error"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_result_error(box: Box, language: str) -> None:
    done = run(box, language, "result.error(new TypeError('bad'))")
    assert done["exitCode"] != 0
    assert (done["error"]["name"], done["error"]["message"]) == ("TypeError", "bad")
    assert set(done["error"]) <= {"name", "message", "stack"}
    assert run(box, language, "result.error('plain')")["error"] == {"name": "Error", "message": "plain"}
    assert run(box, language, "result.error({ my: 'own' })")["error"] == {"my": "own"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_thrown_is_the_error(box: Box, language: str) -> None:
    throws = ("throw new RangeError('far')", "await Promise.reject(new RangeError('far'))")
    for code in throws if language == "ts" else throws[:1]:
        done = run(box, language, code)
        assert done["exitCode"] != 0
        assert (done["error"]["name"], done["error"]["message"]) == ("RangeError", "far"), done
    broken = run(box, language, "this is not code")
    assert broken["exitCode"] != 0 and broken["error"]["name"] == "SyntaxError", broken


def twenty_at_once(box: Box, language: str) -> list[dict[str, Any]]:
    def one(number: int) -> dict[str, Any]:
        return run(box, language, f"console.log('out {number}'); result.set({{ number: {number} }})")

    with ThreadPoolExecutor(20) as pool:
        return list(pool.map(one, range(20)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_twenty_at_once_never_mix(vm: NewVm, language: str) -> None:
    for number, done in enumerate(twenty_at_once(vm(memMb=256), language)):
        assert done.get("result") == {"number": number} and done["stdout"] == f"out {number}\n", done


def test_where_twenty_do_not_fit_those_that_ended_say_so(vm: NewVm) -> None:
    for number, done in enumerate(twenty_at_once(vm(memMb=192), "ts")):
        if done["exitCode"] == 0:
            assert (done["result"], done["stdout"]) == ({"number": number}, f"out {number}\n"), done
        else:
            assert done["exitCode"] == 137 and "out of memory" in done["stderr"], done
            assert done.get("result", {"number": number}) == {"number": number}, done


def test_results_leave_no_trace_in_stdout_or_workspace(box: Box) -> None:
    before = box.output("ls -laR /workspace | grep -v '^total'")
    done = box.ts("result.set({ secret: 'zebra' })")
    assert done["stdout"] == "" and done["stderr"] == ""
    assert box.output("ls -laR /workspace | grep -v '^total'").split() == before.split()
    assert box.output("grep -rl zebra /workspace /tmp /var/tmp /dev/shm || true") == ""


@pytest.mark.every_engine
@pytest.mark.parametrize("language", LANGUAGES)
def test_args_and_env(box: Box, language: str) -> None:
    code = {
        "ts": "result.set([Deno.args, Deno.env.get('A')])",
        "js": "result.set([process.argv.slice(2), process.env.A])",
    }
    done = run(box, language, code[language], args=["one", "--two", "3 4"], env=["A=x=y"])
    assert done["result"] == [["one", "--two", "3 4"], "x=y"], done


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_path_resolves_its_own_imports(box: Box, language: str) -> None:
    extension = "ts" if language == "ts" else "mjs"
    files = {
        f"app/src/main.{extension}": (
            f'import {{ half }} from "../lib/half.{extension}"; result.set([half(84), import.meta.main ?? "none"])'
        ).encode(),
        f"app/lib/half.{extension}": b"export const half = (n) => n / 2",
    }
    assert box.upload(tgz(files)).status_code == 204
    for path in (f"/workspace/app/src/main.{extension}", f"/home/user/app/src/main.{extension}"):
        done = box.call(f"run-{language}", path=path, **({"denoFlags": ["--no-check"]} if language == "ts" else {}))
        assert done["result"][0] == 42, done
        assert language == "js" or done["result"][1] is True
    assert box.ts("result.set(import.meta.main)")["result"] is True


def test_deno_permissions(box: Box) -> None:
    code = """
        const told = (f: () => unknown) => { try { f(); return "done" } catch (e) { return (e as Error).name } };
        const write = (at: string) => told(() => Deno.writeTextFileSync(at + "/p", "x"));
        const files = ["/workspace", "/tmp", "/var/tmp"].map(write);
        const read = told(() => Deno.readTextFileSync("/workspace/p"));
        const rest = [told(() => Deno.readTextFileSync("/etc/passwd")), told(() => new Deno.Command("id").outputSync()),
            write("/dev/shm"), told(() => Deno.hostname())];
        const net = await fetch("http://192.0.2.1/").then(() => "done", (error) => error.name);
        result.set({ files, read, rest, net });
    """
    done = box.ts(code)
    assert done["result"] == {
        "files": ["done"] * 3,
        "read": "done",
        "rest": ["NotCapable"] * 4,
        "net": "NotCapable",
    }, done


def test_no_prompt_and_no_colours(box: Box) -> None:
    done = box.ts("console.error(new Error('x')); console.log({ a: 1 }); Deno.env.get('HOME')")
    assert "\x1b" not in done["stdout"] + done["stderr"]
    assert done["exitCode"] == 1 and done["error"]["name"] == "NotCapable"


@pytest.mark.parametrize("language", LANGUAGES)
def test_timeout(box: Box, language: str) -> None:
    pid = {"ts": "Deno.pid", "js": "process.pid"}[language]
    code = f"result.set('early'); console.log({pid}); setInterval(() => {{}}, 1000)"
    done = run(box, language, code, timeoutMs=int(box.scale(1000)))
    assert (done["exitCode"], done["timedOut"], done["result"]) == (124, True, "early"), done
    assert box.output(f"ls -d /proc/{int(done['stdout'])} 2>/dev/null || true") == ""  # others may wait for scripts


def test_flags(box: Box) -> None:
    assert (
        box.js("result.set(process.execArgv.includes('--no-warnings'))", nodeFlags=["--no-warnings"])["result"] is True
    )
    assert box.ts("const x: number = 'text'; result.set(typeof x)", denoFlags=["--no-check"])["result"] == "string"
    for flag in ("not-a-flag", "-", ""):
        assert box.post("run-ts", {"code": "1", "denoFlags": [flag]}).status_code == 400


@pytest.mark.parametrize("verb", ["run-ts", "run-js"])
@pytest.mark.parametrize(
    "body", [{}, {"code": "1", "path": "a.ts"}, {"code": None}, {"code": 1}, {"code": "1", "env": {"A": "b"}}]
)
def test_exactly_one_source(box: Box, verb: str, body: dict[str, Any]) -> None:
    answer = box.post(verb, body)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("verb", ["run-ts", "run-js"])
def test_paths_of_scripts(box: Box, verb: str) -> None:
    assert box.post(verb, {"path": "/etc/passwd"}).status_code == 400
    assert box.post(verb, {"path": "/workspace/missing.ts"}).status_code in (200, 404)
