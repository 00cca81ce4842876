"""Flags that a caller may give to Deno and Node.js, and the permissions that Deno gets beside them.

Flags may widen what the interpreter allows, since the VM is the boundary. They may not change what is run: a word
would become the program, and some flags run something else, wait for somebody or never end.
"""

from __future__ import annotations

from .job import CHANNEL_FD, CallFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

DENO_REFUSED = frozenset(
    {
        "--help",
        "--version",
        "--watch",
        "--hmr",
        "--watch-exclude",
        "--watch-hmr",
        "--inspect",
        "--inspect-brk",
        "--inspect-wait",
        "--preload",
        "--import",
        "--require",
        "--eval",
        "--repl",
        "--tunnel",
        "--connected",
    }
)
# -h, -V, -t, -c, -L: help, version, a tunnel, and two that take the next word as their value.
DENO_SHORT = {
    "A": "--allow-all",
    "P": "--permission-set",
    "R": "--allow-read",
    "W": "--allow-write",
    "N": "--allow-net",
    "E": "--allow-env",
    "S": "--allow-sys",
    "I": "--allow-import",
    "q": "--quiet",
    "r": "--reload",
}
NODE_REFUSED = frozenset(
    {
        "--help",
        "--version",
        "--v8-options",
        "--eval",
        "--print",
        "--check",
        "--interactive",
        "--run",
        "--entry-url",
        "--prof-process",
        "--build-snapshot",
        "--build-snapshot-config",
        "--build-sea",
        "--experimental-sea-config",
        "--completion-bash",
    }
)
NODE_REFUSED_FAMILIES = ("--inspect", "--debug", "--watch", "--test")

_READABLE = "/tmp,/var/tmp,/etc/resolv.conf,/etc/hosts,/etc/ssl,/usr/lib/ssl,/usr/share/ca-certificates"
# The last one is how the preload opens its channel; it gives that permission back before the program begins.
_WRITABLE = f"/tmp,/var/tmp,/proc/self/fd/{CHANNEL_FD}"


def check_deno_flags(flags: Iterable[str]) -> list[str]:
    """The flags, unchanged; CallFailed `invalid_input` for the first that is refused."""
    for flag in flags:
        _check_form(flag, "denoFlags")
        if not flag.startswith("--"):
            letters = flag[1:].partition("=")[0]
            if not letters or not set(letters) <= DENO_SHORT.keys():
                raise _refused(flag, "denoFlags")
        elif flag.partition("=")[0] in DENO_REFUSED:
            raise _refused(flag, "denoFlags")
    return list(flags)


def check_node_flags(flags: Iterable[str]) -> list[str]:
    """The flags, unchanged; CallFailed `invalid_input` for the first that is refused."""
    for flag in flags:
        _check_form(flag, "nodeFlags")
        name = flag.partition("=")[0].replace("_", "-")  # to Node.js they are the same
        if not name.startswith("--") or name in NODE_REFUSED or name.startswith(NODE_REFUSED_FAMILIES):
            raise _refused(flag, "nodeFlags")
    return list(flags)


def deno_permissions(
    flags: Iterable[str], workspace: str, alias: str, variables: list[str], *, allow_net: bool
) -> list[str]:
    """Our permissions, without those that would narrow or contradict what the caller asks for."""
    asked = set().union(*map(_names, flags))
    if asked & {"--allow-all", "--permission-set"}:
        return [] if allow_net else ["--cached-only"]
    ours = {
        "--allow-read": f"--allow-read={workspace},{alias},{_READABLE}",
        "--allow-write": f"--allow-write={workspace},{alias},{_WRITABLE}",
    }
    if variables:
        ours["--allow-env"] = f"--allow-env={','.join(variables)}"
    if allow_net:
        ours["--allow-net"] = "--allow-net"
        ours["--allow-import"] = "--allow-import"
    else:
        ours["--cached-only"] = "--cached-only"  # says what is missing at once, instead of a failed look-up
    # Lists add up; a bare --allow-read is narrowed by a list, and a bare one of ours would widen the caller's.
    bare = asked & {name for flag in flags if "=" not in flag for name in _names(flag)}
    unwanted = bare | (asked & {"--allow-net", "--allow-import"})
    return [text for name, text in ours.items() if name not in unwanted]


def _names(flag: str) -> set[str]:
    name = flag.partition("=")[0]
    return {name} if name.startswith("--") else {DENO_SHORT[letter] for letter in name[1:]}


def _check_form(flag: str, field: str) -> None:
    if not flag.startswith("-") or flag in ("-", "--"):
        hint = "write a flag and its value as one word, --flag=value"
        raise CallFailed("invalid_input", f"{field}: {flag!r} is not a flag; {hint}")


def _refused(flag: str, field: str) -> CallFailed:
    return CallFailed("invalid_input", f"{field}: {flag!r} is not allowed, it would change what is run or not end")
