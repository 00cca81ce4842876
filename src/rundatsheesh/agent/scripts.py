"""run-ts and run-js: how a script is started under Deno or Node.js, and what it says through the global `result`.

The program's text goes over stdin, the result comes back over a socket of its own, the preload that makes `result` is
a data: URL: nothing of a call is in any file, and nothing that the program prints is mistaken for its result.
"""

from __future__ import annotations

import binascii
import json
import os
import re

from .job import CHANNEL_FD, DEFAULT_ENV, CallFailed, Command
from .paths import ALIAS, WORKSPACE, inside_workspace
from .script_flags import check_deno_flags, check_node_flags, deno_permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What the interpreters print for a program that they cannot load, without an event that the preload could see.
_LOAD_FAILURES = {
    "ts": re.compile(r"^error: (?:Uncaught (?:\(in promise\) )?)?(?:(\w*(?:Error|Exception)): )?(.+)$", re.M),
    "js": re.compile(r"^(\w*Error)(?: \[\w+\])?: (.+)$", re.M),
}
_CUT_OFF = b'{"name":"Error","message":"The program ended before its last result was sent"}'
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_DENO_ENV = {
    # Its heap grows by megabytes. By single pages, as glibc has it in threads but the first, is a system call and
    # a fault each, which an application kernel makes dear: 4 ms of a short script.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": str(4 << 20),
    "DENO_DIR": "/var/tmp/deno",
    "DENO_NO_UPDATE_CHECK": "1",
    "DENO_NO_PROMPT": "1",
    "NO_COLOR": "1",
    # Opens the descriptor to node:fs, without a permission; Deno takes it out of the environment.
    "DENO_EXTRA_STDIO_FDS": str(CHANNEL_FD),
}
_RESERVED = ("DENO_EXTRA_STDIO_FDS", "NODE_CHANNEL_FD")  # would give the channel another meaning
# Deno would keep what it made of the text in files of its cache.
_DENO_ENV_FOR_CODE = {"DENO_EMIT_CACHE_MODE": "disable"}


def prepare(params: dict[str, Any]) -> Command:
    """The command for a script: `code` or `path`, `args`, `env`, `flags`, `allow_net`, `max_output`."""
    _check_variables(params["env"])
    limit = params["max_output"]  # bytes of JSON, as of a stream
    code = params["code"]
    source = "-" if code is not None else _script(params["path"])
    build = _deno if params["language"] == "ts" else _node
    argv, env = build(params, source, limit)
    return Command(
        argv=[*argv, source, *params["args"]],
        env=env,
        given=params["env"],
        cwd=WORKSPACE,
        stdin=b"" if code is None else _encode(code),
        channel=Report(limit, _LOAD_FAILURES[params["language"]]),
        ahead="deno" if _may_wait(params) else None,
    )


def _may_wait(params: dict[str, Any]) -> bool:
    """Whether a Deno that was started before the call is the same to it, but for variables (see ahead_deno.py): flags
    may be for its engine, which is set up then, and the input of a program in a file is another device."""
    return params["language"] == "ts" and params["code"] is not None and not params["flags"]


def _deno(params: dict[str, Any], source: str, limit: int) -> tuple[list[str], dict[str, str]]:
    flags = check_deno_flags(params["flags"])
    argv = [
        _program("deno"),
        "run",
        *flags,  # before ours: a flag that lacks its value must not take the program's place for one
        "--no-prompt",
        *deno_permissions(flags, WORKSPACE, ALIAS, list(params["env"]), allow_net=params["allow_net"]),
        f"--preload={preload_url('deno', limit, from_code=source == '-')}",
    ]
    env = dict(_DENO_ENV)
    if source == "-":
        argv.append("--no-code-cache")
        env |= _DENO_ENV_FOR_CODE
    return argv, env


def _node(params: dict[str, Any], source: str, limit: int) -> tuple[list[str], dict[str, str]]:
    flags = check_node_flags(params["flags"])
    url = preload_url("node", limit, from_code=source == "-")
    return [_program("node"), *flags, f"--import={url}"], {"NO_COLOR": "1"}


def preload_url(runtime: str, limit: int, *, from_code: bool) -> str:
    """The module that makes `result`, as a data: URL. Whoever reads the process table sees no secret in it."""
    head = f"const LIMIT = {limit};\nconst CHANNEL = {CHANNEL_FD};\nconst FROM_CODE = {str(from_code).lower()};\n"
    text = head.encode() + _preload("common") + _preload(runtime)
    return "data:text/javascript;base64," + binascii.b2a_base64(text, newline=False).decode()


_preloads: dict[str, bytes] = {}


def _preload(name: str) -> bytes:
    text = _preloads.get(name)
    if text is None:
        with open(f"{os.path.dirname(__file__)}/preload/{name}.js", "rb") as file:
            text = _preloads[name] = file.read()
    return text


def _check_variables(env: dict[str, str]) -> None:
    for name in env:
        # A comma, a star or an equals sign would mean more than this name to --allow-env.
        if not _VARIABLE.fullmatch(name):
            raise CallFailed("invalid_input", f"{name!r} cannot be the name of a variable")
        if name in _RESERVED:
            raise CallFailed("invalid_input", f"the variable {name} is reserved for the result of the call")


def _script(path: str) -> str:
    real = inside_workspace(path)
    if not os.path.isfile(real):
        raise CallFailed("invalid_input", f"{path} is not a file")
    return real


def _encode(code: str) -> bytes:
    try:
        return code.encode()
    except UnicodeEncodeError:
        raise CallFailed("invalid_input", "the code contains a lone surrogate") from None


def _program(name: str) -> str:
    """Its place by the default PATH, whatever PATH the caller gives the script."""
    for directory in DEFAULT_ENV["PATH"].split(":"):
        path = f"{directory}/{name}"
        if os.access(path, os.X_OK):
            return path
    raise CallFailed("interpreter_missing", f"the image of this VM has no {name}")


class Report:
    """What the preload sends: lines of JSON strings, a letter and JSON text each. Keeps the latest of each letter."""

    def __init__(self, limit: int, load_failure: re.Pattern[str]) -> None:
        self._limit = limit
        self._load_failure = load_failure
        self._max_line = 2 * limit + 64  # every character may need a backslash
        self._line = bytearray()
        self._skipping = False
        self._kept: dict[str, bytes] = {}

    def feed(self, data: bytes) -> None:
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._append(end)
            if not self._skipping:
                self._take(bytes(self._line))
            self._line.clear()
            self._skipping = False
        self._append(rest)

    def finish(self, exit_code: int, stderr: bytes) -> tuple[bytes | None, bytes | None]:
        """The result and the error. `stderr` is looked at where the program ended without having begun."""
        if self._line.startswith(b'"r'):  # rather none than an earlier one
            self._kept.pop("r", None)
            self._kept.setdefault("e", _CUT_OFF)
        error = self._kept.get("e") or self._kept.get("u")
        if error is None and exit_code == 1 and "x" not in self._kept:
            error = _load_failure(self._load_failure, stderr[-65536:])
        return self._kept.get("r"), error

    def _append(self, part: bytes) -> None:
        if len(self._line) + len(part) > self._max_line:
            self._skipping = True
            self._line.clear()
        if not self._skipping:
            self._line += part

    def _take(self, line: bytes) -> None:
        try:
            text = json.loads(line)
        except (ValueError, RecursionError):
            return  # the program wrote to the descriptor itself; it only spoils its own result
        if not isinstance(text, str):
            return
        content = text[1:].encode("utf-8", "replace")
        if text[:1] == "h":
            self._kept.pop("u", None)
        elif text[:1] in ("r", "e", "u", "x") and len(content) <= self._limit:
            self._kept[text[0]] = content


def _load_failure(pattern: re.Pattern[str], stderr: bytes) -> bytes | None:
    text = _COLOUR.sub("", stderr.decode("utf-8", "replace"))
    match = pattern.search(text)
    if match is None:
        return None
    name = match[1] or "Error"
    if match[2].startswith("The module's source code could not be parsed"):
        name = "SyntaxError"
    error = {"name": name, "message": match[2][:400], "stack": text[match.start(2) :].strip()[:400]}
    return json.dumps(error, ensure_ascii=False).encode()
