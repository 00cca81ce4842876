"""The command line: what it prints, what it refuses, how it exits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from source_tree import REPOSITORY
from test_client_calls import OUTCOME, VM

from rundatsheesh import __version__
from rundatsheesh.cli import VERBS, main
from rundatsheesh.commands import host
from rundatsheesh.commands.checks import all_steps, conclude
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host.doctor import Result, fail, ok, warn
from rundatsheesh.manager.settings import Settings


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    """Away from the developer's own settings."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def test_help_names_every_verb(runner: CliRunner) -> None:
    result = runner.invoke(main, ["--help"])
    assert result.exit_code == 0
    for verb in [*VERBS, "version"]:
        assert re.search(rf"^  {verb} ", result.output, re.MULTILINE), verb


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself(runner: CliRunner, verb: str) -> None:
    assert runner.invoke(main, [verb, "--help"]).exit_code == 0


def test_version(runner: CliRunner) -> None:
    assert runner.invoke(main, ["version"]).output == f"{__version__}\n"
    assert runner.invoke(main, ["--version"]).output == f"rds {__version__}\n"


def test_client_verbs_load_no_part_of_the_manager() -> None:
    code = "import sys, rundatsheesh.cli, rundatsheesh.commands.vm; print('rundatsheesh.manager' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_config_prints_every_setting(runner: CliRunner) -> None:
    rows = json.loads(runner.invoke(main, ["config", "--json"]).output)
    assert [row["name"] for row in rows] == [name.upper() for name in Settings.model_fields]
    assert all(row["help"] for row in rows)


def test_config_masks_secrets(runner: CliRunner) -> None:
    secrets = {
        "API_KEY": "sesame",
        "ADMIN_PASSWORD": "swordfish",
        "DATABASE_URL": "postgresql+asyncpg://rds:hunter2@db/rds",
        "PORT": "4000",
    }
    output = runner.invoke(main, ["config"], env=secrets).output
    assert "PORT=4000  (default: 3000)" in output
    assert not [word for word in ("sesame", "swordfish", "hunter2") if word in output]


def test_wrong_settings_are_one_line_each(runner: CliRunner) -> None:
    result = runner.invoke(main, ["config"], env={"PORT": "no", "MAX_VMS": "0"})
    assert result.exit_code == host.USAGE_ERROR
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("rds: PORT='no': ") and lines[1].startswith("rds: MAX_VMS='0': ")


def test_an_open_address_needs_secrets(runner: CliRunner) -> None:
    result = runner.invoke(main, ["serve"], env={"HOST": "0.0.0.0"})
    assert result.exit_code == host.USAGE_ERROR
    expected = "rds: HOST=0.0.0.0 is not a loopback address, so API_KEY, ADMIN_EMAIL, ADMIN_PASSWORD must be set\n"
    assert result.stderr == expected


def test_secrets_are_not_in_complaints() -> None:
    problem = {"msg": "wrong", "loc": ("api_key",), "input": "sesame"}
    assert host.describe_problem(problem) == "API_KEY=********: wrong"


def test_a_host_that_is_unfit_is_told_all_reasons() -> None:
    results = [Result("a", ok("fine")), Result("b", fail("bad", "mend it")), Result("c", fail("worse", "mend that"))]
    with pytest.raises(HostError) as error:
        conclude(results)
    assert "b: bad → mend it" in error.value.message and "c: worse → mend that" in error.value.message
    assert conclude([Result("a", ok("fine"))]) == "fit"
    assert conclude([Result("a", warn("meh", "try"))]) == "fit; see `rds doctor` about a"


def test_the_steps_are_numbered_alike_in_both_halves_of_set_up() -> None:
    script = (REPOSITORY / "scripts/bootstrap.sh").read_text()
    total = re.search(r"^STEPS=(\d+)", script, re.MULTILINE)
    earlier = re.search(r"rds serve --setup --earlier (\d+)", (REPOSITORY / "Makefile").read_text())
    assert total and earlier
    steps = all_steps(Settings(), {})
    assert (
        int(total[1]) == int(earlier[1]) + len(steps) == len(re.findall(r"^ *begin \d", script, re.M)) - 1 + len(steps)
    )


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "-C", str(REPOSITORY), "help"], capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} >= {"serve", "setup", "test", "lint", "lock", "clean"}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_pinned_by_hash_and_name_no_place(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    entries = re.findall(r"^([a-zA-Z0-9_.-]+)(\[[^\]]*\])?(==)?", text, re.MULTILINE)
    assert entries and all(pin == "==" for _, _, pin in entries)
    assert "://" not in text and "--index" not in text and "--find-links" not in text


def test_direct_dependencies_are_locked() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    def locked(name: str) -> set[str]:
        return set(re.findall(r"^([a-z0-9-]+)==", (REPOSITORY / name).read_text(), re.MULTILINE))

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower() for requirement in requirements}

    server, development = names(project["dependencies"]), names(project["optional-dependencies"]["dev"])
    assert server <= locked("requirements.txt"), "run `make lock`"
    assert server | development <= locked("requirements-dev.txt"), "run `make lock`"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["vm-1", "--", "ls", "-l", "a b"], "ls -l 'a b'"),
        (["vm-1", "ls", "-l"], "ls -l"),
        (["vm-1", "--", "echo $HOME | wc"], "echo $HOME | wc"),
        (["--cwd", "/workspace/x", "vm-1", "pwd"], "pwd"),
    ],
)
def test_exec_passes_the_command_on(runner: CliRunner, arguments: list[str], line: str) -> None:
    """Through the real client, to a server that remembers what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(VM)

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["cmd"])
            self.answer(OUTCOME)

        def answer(self, body: object) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        result = runner.invoke(main, ["exec", "--url", f"http://127.0.0.1:{server.server_port}", *arguments])
        server.shutdown()
        thread.join()
    assert asked == [line]
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out", "err")


def test_an_unreachable_server_is_told_in_one_line(runner: CliRunner) -> None:
    result = runner.invoke(main, ["vm", "list", "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
