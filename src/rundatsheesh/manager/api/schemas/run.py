"""Commands and scripts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, JsonValue, model_validator

from rundatsheesh.manager.api.schemas.base import Body, GuestPath, Text, View

MAX_CODE_CHARS = 1 << 20
# A string that becomes one argument or one variable of a process: the kernel's MAX_ARG_STRLEN is 128 KiB with its NUL.
MAX_ARGUMENT_BYTES = (128 << 10) - 1
FLAG = r"^--?[A-Za-z][^\x00]*$"
ENV_KEY = "^[A-Za-z_][A-Za-z0-9_]{0,127}$"

ENV_PAIR = ENV_KEY.removesuffix("$") + r"=[^\x00]*$"

EnvKey = Annotated[str, Field(pattern=ENV_KEY)]
EnvPair = Annotated[str, Field(max_length=MAX_ARGUMENT_BYTES, pattern=ENV_PAIR)]
Argument = Annotated[Text, Field(max_length=MAX_ARGUMENT_BYTES)]
Flag = Annotated[str, Field(max_length=1024, pattern=FLAG)]
Code = Annotated[Text, Field(max_length=MAX_CODE_CHARS)]


class ExecBody(Body):
    cmd: Annotated[Text, Field(min_length=1, max_length=MAX_ARGUMENT_BYTES)] = Field(
        description="Runs under `bash -lc`. At most 131071 bytes; longer ones fit in a file.",
        examples=["id && echo hello"],
    )
    cwd: GuestPath | None = Field(None, description="Where it runs: in /workspace, the default.")
    env: dict[EnvKey, Argument] = Field(default={}, max_length=256, description="Variables of the command.")
    timeout_ms: int | None = Field(None, ge=1, description="120000 by default, up to MAX_EXEC_TIMEOUT_MS.")


_ONE_SOURCE: list[JsonValue] = [
    {"required": [given], "properties": {given: {"type": "string"}, other: {"type": "null"}}}
    for given, other in (("code", "path"), ("path", "code"))
]


class _Script(Body):
    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_SOURCE})

    code: Code | None = Field(None, description="Source text. Either this or `path`.", examples=["console.log(2 + 2)"])
    path: GuestPath | None = Field(None, description="A file in /workspace. Either this or `code`.")
    args: list[Argument] = Field(default=[], max_length=256, description="Arguments of the script.")
    env: list[EnvPair] = Field(
        default=[],
        max_length=256,
        description="`KEY=value` each; the script may read exactly these.",
        examples=[["A=b"]],
    )
    timeout_ms: int | None = Field(None, ge=1, description="120000 by default, up to MAX_EXEC_TIMEOUT_MS.")

    @model_validator(mode="after")
    def _one_source(self) -> _Script:
        if (self.code is None) == (self.path is None):
            raise ValueError("exactly one of code and path must be given")
        return self


class RunTsBody(_Script):
    deno_flags: list[Flag] = Field(default=[], max_length=64, description="More flags of `deno run`, `--name=value`.")


class RunJsBody(_Script):
    node_flags: list[Flag] = Field(default=[], max_length=64, description="More flags of `node`, `--name=value`.")


class ExecView(View):
    exit_code: int = Field(description="124 after a timeout, 128+N after signal N.")
    stdout: str
    stderr: str
    duration_ms: int
    timed_out: bool
    truncated: bool = Field(description="Output was left out in the middle; the text says how much.")


class ScriptView(ExecView):
    result: Any = Field(None, description="What `result.set` was given; absent when it was not called.")
    error: Any = Field(None, description="What `result.error` was given or what was thrown; absent otherwise.")
