"""Everything that is measured, by name: what it is, in which unit, beside which bare runtime, and what is promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Measure:
    key: str
    title: str
    unit: str  # "ms", "MB/s", "MiB", ...
    beside: str | None = None  # key of the bare runtime's measure that its ratio is taken with
    group: str = ""  # measures that belong into one picture


@dataclass(frozen=True, slots=True)
class Goal:
    """A promise about a measure's median: at most, or at least, so much; with `beside`, so many times that one's."""

    key: str
    most: float | None = None
    least: float | None = None
    beside: str | None = None

    def holds(self, value: float) -> bool:
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


CREATE = "Create"
CALL = "Call"
SCRIPT = "Script"
STREAM = "50 MB"
FILES = "2,000 small files"
LOAD = "Under load, and idle"

_ALL = (
    Measure("first_output_warm", "create → first output, warm", "ms", "bare_run_output", CREATE),
    Measure("create_warm", "create, warm", "ms", "bare_run_agent", CREATE),
    Measure("first_output", "create → first output", "ms", "bare_run_output", CREATE),
    Measure("create", "create", "ms", "bare_run_agent", CREATE),
    Measure("first_output_cold", "create → first output, cold", "ms", "bare_run_output", CREATE),
    Measure("create_cold", "create, cold", "ms", "bare_run_agent", CREATE),
    Measure("bare_run_output", "bare: runsc run bash -lc → output", "ms", None, CREATE),
    Measure("bare_run_agent", "bare: runsc run agent → reply", "ms", None, CREATE),
    Measure("first_output_clone", "create → first output, a clone", "ms", "bare_clone", CREATE),
    Measure("create_clone", "create, a clone", "ms", "bare_clone", CREATE),
    Measure("engine_clone", "engine: clone → agent's reply", "ms", "bare_clone", CREATE),
    Measure("bare_clone", "bare: qemu -incoming → agent's reply", "ms", None, CREATE),
    Measure("delete", "delete", "ms", None, CREATE),
    Measure("exec", "exec true", "ms", "bare_exec", CALL),
    Measure("exec_rested", "exec true in a VM that rested", "ms", "bare_exec", CALL),
    Measure("exec_channel", "bare: agent's channel, true", "ms", "bare_exec", CALL),
    Measure("bare_exec", "bare: runsc exec bash -lc true", "ms", None, CALL),
    Measure("http_share", "HTTP's share of exec true", "ms", None, CALL),
    Measure("run_ts", "run-ts hello", "ms", "bare_deno", SCRIPT),
    Measure("run_ts_rested", "run-ts hello in a VM that rested", "ms", "bare_deno", SCRIPT),
    Measure("bare_deno", "bare: deno run in the same VM", "ms", None, SCRIPT),
    Measure("host_deno", "bare: deno run on the host", "ms", None, SCRIPT),
    Measure("run_js", "run-js hello", "ms", "bare_node", SCRIPT),
    Measure("bare_node", "bare: node in the same VM", "ms", None, SCRIPT),
    Measure("upload", "upload", "MB/s", "channel_upload", STREAM),
    Measure("channel_upload", "bare: agent's channel, up", "MB/s", None, STREAM),
    Measure("download", "download", "MB/s", "channel_download", STREAM),
    Measure("channel_download", "bare: agent's channel, down", "MB/s", None, STREAM),
    Measure("upload_files", "upload", "ms", "host_untar", FILES),
    Measure("host_untar", "bare: tar -xz on the host", "ms", None, FILES),
    Measure("download_files", "download", "ms", "host_tar", FILES),
    Measure("host_tar", "bare: tar -cz on the host", "ms", None, FILES),
    Measure("burst_create", "create, all at once", "ms", None, LOAD),
    Measure("burst_failed", "of these neither made nor refused in order", "VMs", None, LOAD),
    Measure("burst_health", "GET /health meanwhile, p99", "ms", None, LOAD),
    Measure("burst_exec", "exec true meanwhile in another VM", "ms", "exec_quiet", LOAD),
    Measure("exec_quiet", "exec true there before", "ms", None, LOAD),
    Measure("idle_memory", "memory of an idle VM", "MiB", None, LOAD),
    Measure("idle_cpu", "CPU of all idle VMs together", "% of a core", None, LOAD),
    Measure("manager_memory", "memory of the manager", "MiB", None, LOAD),
    Measure("growth_memory", "manager's growth over the later half of the cycles", "MiB", None, LOAD),
    Measure("growth_files", "descriptors more than before the cycles", "", None, LOAD),
    Measure("query_after", "GET /v1/vms after the cycles", "ms", "query_before", LOAD),
    Measure("query_before", "GET /v1/vms before the cycles", "ms", None, LOAD),
)
MEASURES: Mapping[str, Measure] = {measure.key: measure for measure in _ALL}

GOALS = (
    Goal("first_output_warm", most=60.0),
    Goal("first_output_warm", most=0.25, beside="bare_run_output"),
    Goal("create_cold", most=1.25, beside="bare_run_agent"),
    Goal("exec", most=0.5, beside="bare_exec"),
    Goal("exec", most=6.0),
    Goal("http_share", most=2.0),
    Goal("run_ts", most=1.2, beside="bare_deno"),
    Goal("run_ts_rested", most=25.0),
    Goal("upload", least=0.7, beside="channel_upload"),
    Goal("download", least=0.7, beside="channel_download"),
    Goal("upload_files", most=2.0, beside="host_untar"),
    Goal("download_files", most=2.0, beside="host_tar"),
    Goal("burst_failed", most=0.0),
    Goal("burst_health", most=50.0),
    Goal("burst_exec", most=2.0, beside="exec_quiet"),
    Goal("idle_memory", most=30.0),
    Goal("idle_cpu", most=5.0),
    Goal("manager_memory", most=150.0),
    Goal("growth_memory", most=1.0),
    Goal("growth_files", most=0.0),
    Goal("query_after", most=1.25, beside="query_before"),
    Goal("engine_clone", most=1.5, beside="bare_clone"),
    Goal("first_output_clone", most=200.0),
)
