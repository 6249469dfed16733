"""docs/measurements/gpu.md, from the folder that gpu.py wrote.

    python tests/benchmarks/gpu_page.py docs/measurements/gpu > docs/measurements/gpu.md

Without a folder, or with one that was not measured on a GPU, the page says "not yet
measured" and names the command. Every figure on it stands in the folder.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = "# Figures of a GPU\n"
NOT_YET = """
Not yet measured. No GPU timing of ours exists.

On a machine with a GPU, without a network, in at most ten minutes:

```sh
make gpu
```

It writes a folder `docs/measurements/gpu` and makes this page of it ([gpu.py](../../tests/benchmarks/gpu.py), [gpu_page.py](../../tests/benchmarks/gpu_page.py)): the environment; the clock against torch.profiler; the policies of `fp8tune bench` with regret, tuning seconds and peak memory; the depth of the launch queue; the tests marked `gpu`; one trial with wall time beside its spans and the SM clock; the demo; `sweep` for rowwise and tensorwise. A part that fails is named and the others go on.
"""


def page(folder: Path) -> str:
    """The page, as Markdown."""
    where = load(folder, "environment.json")
    if not where or "sm_count" not in where:
        return HEAD + NOT_YET
    sections = [HEAD, environment(where), parts(load(folder, "parts.json") or {})]
    sections += [tests(folder), clock(folder), policies(folder), trial(folder)]
    sections.append(sweeps(folder))
    return "\n".join(x for x in sections if x)


def load(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(x) for x in row)} |" for row in lines) + "\n"


def environment(where: dict[str, Any]) -> str:
    rows = [[key, f"`{value}`"] for key, value in where.items()]
    return "## Environment\n\n" + table(["What", "Value"], rows)


def parts(ended: dict[str, Any]) -> str:
    rows = [[name, x["outcome"], x["seconds"]] for name, x in ended.items()]
    return "## Parts\n\n" + table(["Part", "How it ended", "Seconds"], rows)


def tests(folder: Path) -> str:
    path = folder / "tests.xml"
    if not path.exists():
        return ""
    suite = ET.parse(path).getroot().find("testsuite")  # noqa: S314 - our own report
    if suite is None:
        return ""
    counts = ", ".join(f"{suite.get(x)} {x}" for x in ("tests", "failures", "errors"))
    failed = [
        f"- `{x.get('classname')}::{x.get('name')}`"
        for x in suite.iter("testcase")
        if x.find("failure") is not None or x.find("error") is not None
    ]
    return "## Tests marked gpu\n\n" + "\n".join([f"{counts}.", "", *failed]) + "\n"


def clock(folder: Path) -> str:
    found = load(folder, "bench.json") or {}
    rows = [
        [f"{x['m']} x {x['k']} x {x['n']}", x["variant"], x["kernels"]]
        + [f"{x[key]:.4f}" for key in ("event_ms", "span_ms")]
        + [f"{x['ratio']:.3f}"]
        for x in found.get("clock_agreement", [])
    ]
    head = ["M x K x N", "Variant", "Launches", "Events, ms", "Profiler, ms", "Ratio"]
    depth = (load(folder, "queue.json") or {}).get("launches", "not yet measured")
    compared = (
        table(head, rows) if rows else "Against the profiler: not yet measured.\n"
    )
    counts = (
        f"Launches that fit into the driver's queue: {depth}. Batches thrown away: "
        f"{found.get('discarded', 'not yet measured')}; timed with launch gaps: "
        f"{found.get('with_gaps', 'not yet measured')}.\n"
    )
    return "\n".join(["## The clock\n", compared, counts])


def policies(folder: Path) -> str:
    found = load(folder, "bench.json")
    if not found:
        return "## Policies\n\nNot yet measured.\n"
    lines = [f"## Policies, {found['recipe']}\n"]
    for x in found["workloads"]:
        work = x["workload"]
        small = " (scaled down)" if work["small"] else ""
        rows = [policy_row(row) for row in x["policies"]]
        lines.append(f"### {work['name']}@{work['m']}{small}\n")
        lines.append(table(POLICY_HEAD, rows))
        lines += [f"{note}.\n" for note in x["notes"]]
    for state, cost in found["tuning_cost"].items():
        lines.append(
            f"Tuning with a {state} compile cache: {cost['tuning_s']:.1f} s, "
            f"{cost['warm_up_s']:.1f} s of it compiling and warming up.\n"
        )
    lines += [f"Not run: {x}.\n" for x in found["missing"]]
    return "\n".join(lines)


POLICY_HEAD = ["Policy", "Converted", "Step ms", "Speedup", "Regret", "Peak MB"]
POLICY_HEAD += ["Tuning s", "Steps"]


def policy_row(row: dict[str, Any]) -> list[Any]:
    peak, seconds = row["peak_bytes"], row["tuning_s"]
    return [
        row["policy"],
        len(row["converted"]),
        f"{row['step_ms']:.3f}",
        interval(row["speedup"]),
        interval(row["regret"]),
        "-" if peak is None else f"{peak / 2**20:.0f}",
        "-" if seconds is None else f"{seconds:.1f}",
        "-" if row["steps"] is None else row["steps"],
    ]


def interval(found: dict[str, float | None] | None) -> str:
    if found is None or found["middle"] is None:
        return "-"
    low, high = (
        "?" if found[x] is None else f"{found[x]:.3f}" for x in ("low", "high")
    )
    return f"{found['middle']:.3f} [{low}, {high}]"


def trial(folder: Path) -> str:
    found = load(folder, "trial.json")
    if not found:
        return "## One trial\n\nNot yet measured.\n"
    rows: list[list[Any]] = []
    for phase in dict.fromkeys(x["phase"] for x in found["steps"]):
        steps = [x for x in found["steps"] if x["phase"] == phase]
        wall = median(x["wall_ms"] for x in steps)
        clocks = megahertz([x["sm_mhz"] for x in steps])
        rows.append([phase, len(steps), f"{wall:.3f}", clocks])
    rows.append(["timing of layers", "-", "-", megahertz(found["timing_sm_mhz"])])
    spans = found["spans_ms"]
    line = f"Median span of {len(spans)} by events: " + (
        f"{median(spans):.3f} ms.\n" if spans else "none.\n"
    )
    head = ["Phase", "Steps", "Start to start, ms", "SM clock, MHz"]
    plan = f"```text\n{found['plan']}\n```\n"
    return "\n".join(["## One trial\n", table(head, rows), line, plan])


def megahertz(clocks: Sequence[int | None]) -> str:
    known = [x for x in clocks if x is not None]
    return f"{median(known):.0f}" if known else "-"


def sweeps(folder: Path) -> str:
    found = sorted(folder.glob("sweep-*.json"))
    if not found:
        return ""
    listed = [f"- [{x.name}]({folder.name}/{x.name})" for x in found]
    return "\n".join(["## Sweeps\n", *listed, ""])


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1])))
