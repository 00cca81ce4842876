"""Run by the guest's own Python, see agent.py: the agent's sources by their names on stdin (JSON), the pack on stdout.

The pack holds the agent's modules, and those of the standard library that are loaded once it serves. Docstrings and
assertions are left out: each of the agent's processes would keep them in memory. Its form is told in the agent's
__main__.py, which reads it.
"""

from __future__ import annotations

import importlib
import json
import marshal
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType

PACKAGE = "agent"
PLACE = "/opt/rds/agent/"  # where tracebacks find the sources
SERVING = ("init", "server", "files")  # what imports all that a guest's agent needs


class Sources:
    """Finds and loads the agent's modules where they are not in any file."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.codes = {_module(name): _compile(text, PLACE + name) for name, text in texts.items()}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        known = name in self.codes
        return ModuleSpec(name, self, is_package=name == PACKAGE) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # as usual

    def exec_module(self, module: ModuleType) -> None:
        exec(self.codes[module.__name__], module.__dict__)


def library() -> dict[str, tuple[CodeType, bool]]:
    """The modules loaded here that come from files: name → (code, whether it is a package)."""
    found = {}
    for name, module in sys.modules.items():
        spec = getattr(module, "__spec__", None)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            code = _compile(spec.loader.get_data(spec.loader.path), spec.loader.path)
            found[name] = code, spec.submodule_search_locations is not None
    return found


def pack(modules: dict[str, tuple[CodeType, bool]]) -> bytes:
    index, codes, offset = {}, [], 0
    for name, (code, is_package) in modules.items():
        codes.append(marshal.dumps(code))
        index[name] = (offset, len(codes[-1]), is_package)
        offset += len(codes[-1])
    head = marshal.dumps(index)
    return b"".join([len(head).to_bytes(4, "little"), head, *codes])


def _module(name: str) -> str:
    return PACKAGE if name == "__init__.py" else f"{PACKAGE}.{name.removesuffix('.py')}"


def _compile(text: str | bytes, path: str) -> CodeType:
    code: CodeType = compile(text, path, "exec", dont_inherit=True, optimize=2)
    return code


def main() -> None:
    sources = Sources(json.load(sys.stdin))
    sys.meta_path.insert(0, sources)
    for name in SERVING:
        if f"{PACKAGE}.{name}" in sources.codes:
            importlib.import_module(f"{PACKAGE}.{name}")
    modules = library() | {name: (code, name == PACKAGE) for name, code in sources.codes.items()}
    sys.stdout.buffer.write(pack(modules))


if __name__ == "__main__":
    main()
