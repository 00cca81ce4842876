"""What `rds doctor` looks at, and what a set-up does: the lists that only somebody who sees all parts can write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rundatsheesh.manager.build import AGENT
from rundatsheesh.manager.build.agent import ensure_agent, find_agent
from rundatsheesh.manager.build.image import ensure_boot_files, ensure_image, find_image, wants_boot_files
from rundatsheesh.manager.build.recipe import recipe_hash
from rundatsheesh.manager.engines.base import Availability
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.host import doctor
from rundatsheesh.manager.host.doctor import Check, Finding, Level, Result
from rundatsheesh.manager.host.setup import Report, Step, host_steps
from rundatsheesh.manager.settings import Settings

# Engine name → how to ask it whether this host can run it.
Engines = Mapping[str, Callable[[], Availability]]


def engines_of(settings: Settings) -> Engines:
    from rundatsheesh.manager import app  # with the whole server behind it: only when it is needed

    return {name: engine.available for name, engine in app.engines(settings).items()}


def all_checks(settings: Settings) -> tuple[Check, ...]:
    engines = engines_of(settings)
    return (
        *doctor.host_checks(storage_root=settings.storage_root, image_cache=settings.image_cache),
        Check("guest image", doctor.in_thread(lambda: _image(settings))),
        *(Check(f"engine {name}", doctor.in_thread(partial(_engine, ask))) for name, ask in engines.items()),
        Check("engines", doctor.in_thread(lambda: _any_engine(engines))),
    )


def all_steps(settings: Settings, environment: Mapping[str, str]) -> tuple[Step, ...]:
    """The steps of a set-up after the interpreter and its packages. The last one refuses an unfit host."""

    async def build(report: Report) -> str:
        image = await ensure_image(settings.image_cache, environment, report)
        await ensure_boot_files(image, environment, report)
        report("packing the agent with the guest's Python")
        await ensure_agent(settings.image_cache, image, AGENT)
        return f"{image.id}, {image.manifest.size_bytes >> 20} MiB"

    async def examine(report: Report) -> str:
        report("examining the host")
        return conclude(await doctor.examine(all_checks(settings)))

    def look() -> str | None:
        image = find_image(settings.image_cache)
        if image is None or wants_boot_files(image) or find_agent(settings.image_cache, image, AGENT) is None:
            return None
        return image.id

    return (
        *host_steps(settings.image_cache, environment),
        Step("guest image", look, build),
        Step("host check", lambda: None, examine, alone=False),
    )


def conclude(results: Sequence[Result]) -> str:
    """A summary in a few words; raises HostError naming every fact that keeps the server from running."""
    failed = [result for result in results if result.finding.level is Level.FAIL]
    if failed:
        facts = [f"{result.name}: {result.finding.fact} → {result.finding.hint}" for result in failed]
        raise HostError("this host cannot run VMs yet:\n  " + "\n  ".join(facts))
    warned = [result.name for result in results if result.finding.level is Level.WARN]
    return f"fit; see `rds doctor` about {', '.join(warned)}" if warned else "fit"


def _image(settings: Settings) -> Finding:
    image = find_image(settings.image_cache)
    if image is None:
        return doctor.fail(f"no image of recipe {recipe_hash()}", doctor.SET_UP)
    manifest = image.manifest
    return doctor.ok(f"{image.id}: Debian {manifest.suite}, {manifest.size_bytes >> 20} MiB")


def _engine(available: Callable[[], Availability]) -> Finding:
    answer = available()
    if answer.usable:
        return doctor.ok(answer.fact)
    return doctor.warn(answer.fact, answer.hint or "this engine cannot be used here")


def _any_engine(engines: Engines) -> Finding:
    usable = [name for name, available in engines.items() if available().usable]
    if usable:
        return doctor.ok(f"usable: {', '.join(usable)}")
    return doctor.fail("none is usable", "the engines above say what each of them needs")
