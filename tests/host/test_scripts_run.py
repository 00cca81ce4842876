"""What a script may do, where it runs, and which flags it may bring, under the real Deno and Node.js."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from script_harness import ABSENT, Scripts, make_scripts

from rundatsheesh.agent import scripts as agent_scripts
from rundatsheesh.agent.job import CallFailed
from rundatsheesh.agent.script_flags import check_deno_flags, check_node_flags, deno_permissions

BOTH = pytest.mark.parametrize("language", ["ts", "js"])


@pytest.fixture(params=["at the call", "ahead of it"])
def scripts(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripts:
    return make_scripts(tmp_path, monkeypatch, ahead=request.param == "ahead of it")


@BOTH
def test_code_runs_in_the_workspace_and_leaves_nothing(scripts: Scripts, language: str) -> None:
    (scripts.workspace / "beside.mjs").write_text("export const x = 'beside';")
    code = "import {x} from './beside.mjs'; const secret = 'tell-' + 'nobody'; console.log(x, process.cwd()); await 1"
    got = scripts.run(language, code.replace("process.", "Deno." if language == "ts" else "process."))
    assert (got.exit_code, got.stdout, got.stderr) == (0, f"beside {scripts.workspace}\n", "")
    assert [p.name for p in scripts.workspace.iterdir()] == ["beside.mjs"]
    for path in scripts.workspace.parent.rglob("*"):
        assert not path.is_file() or b"nobody" not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["main.ts", "main.mts", "main.js", "main.mjs", "with space#1%20.ts"])
def test_deno_path(scripts: Scripts, name: str) -> None:
    place = scripts.workspace / "sub dir"
    place.mkdir()
    (place / "lib.ts").write_text("export const lib: string = 'lib';")
    (place / name).write_text(
        "import {lib} from './lib.ts'; const {main, filename} = import.meta;"
        "result.set([lib, main, Deno.args, Deno.cwd(), filename]);"
    )
    got = scripts.run("ts", path=str(place / name), args=["a", "-b", "--version"])
    assert got.result == ["lib", True, ["a", "-b", "--version"], str(scripts.workspace), str(place / name)]
    assert (got.exit_code, got.stderr) == (0, "")


REQUIRE = "const {lib} = require('./lib.cjs'); const main = require.main === module;"
IMPORT = "import {lib} from './lib.cjs'; const main = import.meta.main;"


@pytest.mark.parametrize(
    ("name", "code"),
    [("main.cjs", REQUIRE), ("main.js", REQUIRE), ("main.mjs", IMPORT + "await 1;"), ("esm.js", IMPORT)],
)
def test_node_path(scripts: Scripts, name: str, code: str) -> None:
    (scripts.workspace / "lib.cjs").write_text("exports.lib = 'lib';")
    (scripts.workspace / name).write_text(code + "result.set([lib, main, process.argv.slice(1)])")
    got = scripts.run("js", path=name, args=["a", "--version"])
    assert got.result == ["lib", True, [str(scripts.workspace / name), "a", "--version"]]


@pytest.mark.parametrize(
    "code",
    [
        "const fs = require('fs'); console.log(typeof fs.readFileSync)",
        "import fs from 'fs'; console.log(typeof fs.readFileSync)",
        "const fs = await import('fs'); console.log(typeof fs.readFileSync)",
        "const fs = require('fs'); await 1; console.log(typeof fs.readFileSync)",
        "import fs from 'fs'; console.log(typeof require('fs').readFileSync, await 1) || fs",
        "console.log(typeof require('./own').fs.readFileSync)",
    ],
)
def test_node_code_in_either_module_system(scripts: Scripts, code: str) -> None:
    (scripts.workspace / "own.js").write_text("exports.fs = require('fs')")
    got = scripts.run("js", code, args=["x"])
    assert (got.exit_code, got.stdout.split()[0], got.stderr) == (0, "function", "")


def test_node_leaves_the_module_systems_of_files_alone(scripts: Scripts) -> None:
    (scripts.workspace / "m.mjs").write_text("console.log(typeof require, typeof result.set)")
    assert scripts.run("js", path="m.mjs").stdout == "undefined function\n"


def test_deno_environment_is_exactly_what_was_given(scripts: Scripts) -> None:
    code = """
        const seen: string[] = [];
        for (const key of ["TOKEN", "URL_2", "PATH", "HOME", "DENO_DIR", "OTHER"]) {
            try { seen.push(String(Deno.env.get(key))) } catch (e) { seen.push(e.name) }
        }
        try { Deno.env.toObject(); seen.push("all") } catch (e) { seen.push(e.name) }
        result.set(seen);"""
    got = scripts.run("ts", code, env={"TOKEN": "s3cret=, *", "URL_2": ""})
    assert got.result == ["s3cret=, *", "", "NotCapable", "NotCapable", "NotCapable", "NotCapable", "NotCapable"]
    assert scripts.run("ts", code).result == ["NotCapable"] * 7


def test_node_environment(scripts: Scripts) -> None:
    os.environ["RDS_OF_THE_HOST"] = "1"
    got = scripts.run("js", "result.set(process.env)", env={"TOKEN": "t", "PATH": "/nowhere"})
    assert got.result["TOKEN"] == "t" and got.result["PATH"] == "/nowhere" and got.result["HOME"] == "/workspace"
    assert not {"NODE_CHANNEL_FD", "DENO_EXTRA_STDIO_FDS", "RDS_OF_THE_HOST", "NODE_OPTIONS"} & got.result.keys()


def test_deno_files(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("outside")
    code = """
        const seen: unknown[] = [];
        const tell = (f: () => unknown) => { try { f(); seen.push(true) } catch (e) { seen.push(e.name) } };
        tell(() => Deno.writeTextFileSync("mine", "1")); tell(() => Deno.readTextFileSync("mine"));
        tell(() => Deno.readTextFileSync("/etc/passwd")); tell(() => Deno.writeTextFileSync("/etc/x", ""));
        tell(() => Deno.readTextFileSync("/etc/hosts")); tell(() => Deno.readTextFileSync("/proc/self/environ"));
        tell(() => Deno.openSync("/proc/self/fd/3", {write: true}));
        tell(() => new Deno.Command("true").outputSync()); tell(() => Deno.hostname());
        try { await Deno.connect({hostname: "127.0.0.1", port: 1}) } catch (e) { seen.push(e.name) }
        result.set(seen);"""
    got = scripts.run("ts", code)
    denied = "NotCapable"
    assert got.result == [True, True, denied, denied, True, denied, denied, denied, denied, denied]
    assert scripts.run("ts", code, allow_net=True).result[-1] == "ConnectionRefused"  # tried, and nobody listens


def test_deno_imports_from_elsewhere(scripts: Scripts) -> None:
    code = "import 'https://127.0.0.1:1/x.ts'"
    assert "cache" in scripts.run("ts", code).error["message"]
    tried = scripts.run("ts", code, allow_net=True).error["message"]
    assert "import access" not in tried and "cache" not in tried
    assert "cache" in scripts.run("ts", "import 'npm:left-pad'").error["stack"]


def test_no_colour_and_no_prompt(scripts: Scripts) -> None:
    code = "console.log({a: 'x'}); prompt('?'); Deno.readTextFileSync('/etc/passwd')"
    got = scripts.run("ts", code, env={"TERM": "xterm-256color"})
    assert got.exit_code == 1 and "\x1b" not in got.stdout + got.stderr
    got = scripts.run("js", "console.log({a: 'x'}); null.x", env={"TERM": "xterm-256color"})
    assert got.exit_code == 1 and "\x1b" not in got.stdout + got.stderr


@pytest.mark.parametrize(
    "flags", [["--deny-write"], ["--deny-write=/proc"], ["-A"], ["--allow-write"], ["-W=/etc"], ["-R"]]
)
def test_the_channel_works_whatever_may_be_written(scripts: Scripts, flags: list[str]) -> None:
    got = scripts.run("ts", "result.set([1]); throw new TypeError('t')", flags=flags)
    assert (got.exit_code, got.result, got.error["name"]) == (1, [1], "TypeError")


@BOTH
def test_stdin_of_a_script_is_empty(scripts: Scripts, language: str) -> None:
    read = (
        "await new Response(Deno.stdin.readable).text()"
        if language == "ts"
        else "require('fs').readFileSync(0, 'utf8')"
    )
    (scripts.workspace / "in.js").write_text(f"result.set({read})")
    assert scripts.run(language, path="in.js").result == ""
    if language == "ts":
        assert scripts.run(language, f"result.set({read})").result == ""


def test_flags_are_used(scripts: Scripts) -> None:
    assert scripts.run("ts", "result.set(Deno.env.get('HOME'))", flags=["--allow-env=HOME"]).result == "/workspace"
    assert scripts.run("ts", "result.set(Deno.env.get('A') + Deno.env.get('HOME'))", env={"A": "a"},
                       flags=["--allow-env"]).result == "a/workspace"  # fmt: skip
    read = (
        "result.set(Deno.readTextFileSync('/etc/passwd').length > 0 && Deno.readTextFileSync('/etc/hosts').length >= 0)"
    )
    for flags in (["-A"], ["--allow-all"], ["--allow-read"], ["-R"], ["-qR"], ["--allow-read=/etc"], ["-R=/etc"]):
        assert scripts.run("ts", read, flags=flags).result is True, flags
    assert scripts.run("ts", "result.set(typeof Deno.openKv)", flags=["--unstable-kv"]).result == "function"
    (scripts.workspace / "map.json").write_text('{"imports": {"me": "./me.ts"}}')
    (scripts.workspace / "me.ts").write_text("export default 'me'")
    assert scripts.run("ts", "import me from 'me'; result.set(me)", flags=["--import-map=map.json"]).result == "me"
    got = scripts.run("js", "result.set(process.execArgv.includes('--no-warnings'))", flags=["--no-warnings"])
    assert got.result is True
    got = scripts.run("js", "import x from 'fs'; result.set(1)", flags=["--input-type=module"])
    assert got.result == 1


@pytest.mark.parametrize("flag", ["--config", "--import-map", "--cert", "--ext", "--env-file", "--v8-flags", "--lock"])
def test_a_flag_without_its_value_never_takes_the_programs_place(scripts: Scripts, flag: str) -> None:
    (scripts.workspace / "evil.ts").write_text("console.log('evil')")
    got = scripts.run("ts", "console.log('asked for')", flags=[flag], args=["evil.ts"])
    assert "evil" not in got.stdout and (got.exit_code != 0 or got.stdout == "asked for\n")


@pytest.mark.parametrize(
    "flag",
    [
        "evil.ts",
        "",
        "-",
        "--",
        "--watch",
        "--watch=x",
        "--inspect-brk",
        "--inspect=0.0.0.0:1",
        "--preload=x",
        "--help",
        "--version",
        "-h",
        "-V",
        "-hq",
        "-t",
        "-c",
        "-L",
        "--eval",
        "--require=x",
        "-=x",
        "--hmr",
    ],
)
def test_refused_deno_flags(flag: str) -> None:
    with pytest.raises(CallFailed) as caught:
        check_deno_flags(["--quiet", flag])
    assert caught.value.code == "invalid_input" and repr(flag) in caught.value.message


@pytest.mark.parametrize(
    "flag",
    [
        "evil.js",
        "",
        "-",
        "--",
        "-e",
        "-p",
        "-i",
        "-r",
        "--eval=1",
        "--print",
        "--test",
        "--test-only",
        "--test_only",
        "--watch-path=x",
        "--inspect",
        "--inspect_brk",
        "--v8-options",
        "--run=x",
        "--build_sea=x",
        "--check",
    ],
)
def test_refused_node_flags(flag: str) -> None:
    with pytest.raises(CallFailed) as caught:
        check_node_flags(["--no-warnings", flag])
    assert caught.value.code == "invalid_input" and repr(flag) in caught.value.message


def test_permissions_are_exactly_the_promised_ones() -> None:
    system = "/tmp,/var/tmp,/etc/resolv.conf,/etc/hosts,/etc/ssl,/usr/lib/ssl,/usr/share/ca-certificates"
    files = [
        f"--allow-read=/workspace,/home/user,{system}",
        "--allow-write=/workspace,/home/user,/tmp,/var/tmp,/proc/self/fd/3",
    ]
    args: tuple[list[str], str, str] = ([], "/workspace", "/home/user")
    assert deno_permissions(*args, [], allow_net=False) == [*files, "--cached-only"]
    assert deno_permissions(*args, ["A", "B"], allow_net=True) == [
        *files, "--allow-env=A,B", "--allow-net", "--allow-import",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["A,B", "*", "A=B", "", "1A", "A B", "NODE_CHANNEL_FD", "DENO_EXTRA_STDIO_FDS", "Ä"])
def test_refused_variables(scripts: Scripts, name: str) -> None:
    with pytest.raises(CallFailed) as caught:
        scripts.run("ts", "1", env={name: "x"})
    assert caught.value.code == "invalid_input"


def test_refused_paths(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "outside.ts").write_text("")
    (scripts.workspace / "link.ts").symlink_to(tmp_path / "outside.ts")
    (scripts.workspace / "dir").mkdir()
    for path, code in {
        "../outside.ts": "path_outside_workspace",
        str(tmp_path / "outside.ts"): "path_outside_workspace",
        "link.ts": "path_outside_workspace",
        "missing.ts": "path_not_found",
        "dir": "invalid_input",
    }.items():
        with pytest.raises(CallFailed) as caught:
            scripts.run("ts", path=path)
        assert caught.value.code == code, path


def test_text_that_is_no_text(scripts: Scripts) -> None:
    with pytest.raises(CallFailed) as caught:
        scripts.run("ts", "'\ud800'")
    assert caught.value.code == "invalid_input"


def test_a_missing_interpreter_is_told() -> None:
    with pytest.raises(CallFailed) as caught:
        agent_scripts._program("no-such-interpreter")
    assert caught.value.code == "interpreter_missing"


@BOTH
def test_empty_code_is_a_program(scripts: Scripts, language: str) -> None:
    got = scripts.run(language, "")
    assert (got.exit_code, got.stdout, got.stderr, got.result) == (0, "", "", ABSENT)
