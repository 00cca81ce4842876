"""Who may import whom, who may start processes, who may read the environment, and how large things may grow."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from source_tree import PACKAGE, REPOSITORY, imports, modules

MANAGER = "rundatsheesh.manager."

# Parts of the manager by height: a part may import lower ones and itself.
HEIGHT = {
    "model": 0,
    "errors": 0,
    "settings": 0,
    "host": 1,
    "disk": 2,
    "build": 3,
    "engines": 3,
    "guest": 3,
    "net": 3,
    "store": 3,
    "vms": 4,
    "expiry": 5,
    "pool": 5,
    "reconcile": 5,
    "api": 6,
    "app": 7,
}
# Modules beside a part that belong to it.
BELONGS_TO = {
    "migrations": "store",
    "overview": "model",
}

STARTS_PROCESSES = {"subprocess", "multiprocessing", "pty"}
STARTING_CALLS = {
    "os": {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp"},
    "asyncio": {"create_subprocess_exec", "create_subprocess_shell"},
}
READS_ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

NAMES = sorted(modules())
HOST_SIDE = [name for name in NAMES if not name.startswith("rundatsheesh.agent")]


def part_of(name: str) -> str | None:
    """The manager's part that a module is in; None outside the manager."""
    if not name.startswith(MANAGER):
        return None
    top = name.removeprefix(MANAGER).split(".")[0]
    if top in BELONGS_TO:
        return BELONGS_TO[top]
    # A part may be one module or several that share its name: guest.py and guest_calls.py.
    return top if top in HEIGHT else next((part for part in HEIGHT if top.startswith(f"{part}_")), top)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(MANAGER)])
def test_the_manager_imports_downwards(name: str) -> None:
    part = part_of(name)
    assert part in HEIGHT, f"{name}: say in HEIGHT how high this part stands"
    for imported in imports(name):
        other = part_of(imported)
        if other is not None and other != part:
            assert HEIGHT[other] < HEIGHT[part], f"{name} imports {imported}, which is not below it"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(MANAGER)])
def test_the_manager_takes_only_the_wire_from_the_agent(name: str) -> None:
    for imported in imports(name):
        if imported.startswith("rundatsheesh.agent"):
            assert imported.startswith("rundatsheesh.agent.wire"), f"{name} imports {imported}"
        assert not imported.startswith(("rundatsheesh.client", "rundatsheesh.commands", "rundatsheesh.cli"))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("rundatsheesh.agent")])
def test_the_agent_imports_the_standard_library_only(name: str) -> None:
    for imported in imports(name):
        top = imported.split(".")[0]
        inside = imported.startswith("rundatsheesh.agent")
        assert inside or top in sys.stdlib_module_names, f"{name} imports {imported}"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in NAMES
        if name.startswith(
            (
                "rundatsheesh.client",
                "rundatsheesh.bench",
                "rundatsheesh.commands.vm",
                "rundatsheesh.commands.key",
                "rundatsheesh.commands.bench",
            )
        )
    ],
)
def test_the_client_imports_neither_manager_nor_agent(name: str) -> None:
    for imported in imports(name):
        assert not imported.startswith(("rundatsheesh.manager", "rundatsheesh.agent")), f"{name} imports {imported}"


@pytest.mark.parametrize("name", HOST_SIDE)
def test_one_door_to_processes(name: str) -> None:
    if name == "rundatsheesh.manager.host.process":
        return
    for imported in imports(name):
        assert imported.split(".")[0] not in STARTS_PROCESSES, f"{name} imports {imported}"
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, attribute = node.value.id, node.attr
            forbidden = STARTING_CALLS.get(module, set())
            starts = attribute in forbidden or (module == "os" and attribute.startswith(("exec", "spawn")))
            assert not starts, f"{name}:{node.lineno} uses {module}.{attribute}"


@pytest.mark.parametrize("name", HOST_SIDE)
def test_one_reader_of_the_environment(name: str) -> None:
    if name == "rundatsheesh.manager.settings":
        return
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Attribute) and node.attr in READS_ENVIRONMENT:
            assert not (isinstance(node.value, ast.Name) and node.value.id == "os"), f"{name}:{node.lineno}"
    assert not {f"os.{word}" for word in READS_ENVIRONMENT} & set(imports(name)), name


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_stay_small(name: str) -> None:
    tree = modules()[name]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if ".migrations.versions." in name:
        functions = []  # a migration is a table written down, in one function by its framework's rule
    for function in functions:
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, f"{name}.{function.name} has {lines} lines"
    path = PACKAGE.parent.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert len(file.read_text().splitlines()) <= MAX_FILE_LINES, file


def test_no_committed_file_names_a_registry() -> None:
    """Where packages come from is each machine's own affair. The names are in pieces, or this file would hold them."""
    hosts = [".".join(pieces) for pieces in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))]
    hosts += [".".join(pieces) for pieces in (("npmjs", "com"), ("deb", "debian", "org"), ("docker", "io"))]
    hosts += [".".join(pieces) for pieces in (("archive", "ubuntu", "com"), ("ghcr", "io"), ("quay", "io"))]
    hosts += [".".join(pieces) for pieces in (("ftp", "debian", "org"), ("jsr", "io"), ("deno", "land"))]
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-z"], check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        path = REPOSITORY / name
        if not path.is_file():  # deleted and not yet committed
            continue
        content = path.read_bytes().decode(errors="replace")
        assert not [host for host in hosts if host in content], f"{name} names a registry"
