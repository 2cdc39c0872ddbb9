"""The command: `python -m bench.gpu --help`."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.gpu import machine
from bench.gpu.catalogue import CPU_LIMIT, LIMIT, PARTS, Part, chosen
from bench.gpu.results import Results
from bench.gpu.running import run_part
from bench.gpu.setting import Setting

RESULTS = machine.ROOT / "bench" / "results" / "gpu.json"
ELSEWHERE = machine.ROOT / "out" / "gpu.json"  # where there is no GPU, figures of one are not to be replaced
MARKS = {"done": "[green]done[/]", "skipped": "[yellow]skipped[/]"}
HELP = f"""Shows on a machine with a GPU what only a GPU shows. Ends within {LIMIT / 60:.0f} minutes on one H100.

\b
{chr(10).join(f"{part.letter}  {part.title} (at most {part.limit:.0f} s)" for part in PARTS)}

\b
Examples:
  python -m bench.gpu                                all parts
  python -m bench.gpu --part b,f                     two of them
  python -m bench.gpu --wheels wheels                with wheels of packages this machine lacks
  python -m bench.gpu --nccl .nccl/libnccl.so.2.xz   with an NCCL that lets ranks share a card
  python -m bench.gpu --cpu                          tiny shapes on the CPU: does the code run?

Without a GPU every part says what it skips. The status is 1 if a part failed, was wrong or ran out of time.
"""


def main(
    part: Annotated[str | None, typer.Option(help="Letters, such as a,c. All parts if not given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File of results. bench/results/gpu.json; without a GPU out/gpu.json.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Tiny shapes on the CPU, to try the code.")] = False,
    nccl: Annotated[
        Path | None, typer.Option(help="NCCL to load, also as .xz. .nccl/libnccl.so.2(.xz) if it is there.")
    ] = None,
    wheels: Annotated[Path | None, typer.Option(help="Folder of wheels to install for this run alone.")] = None,
    seconds: Annotated[float, typer.Option(help="Limit for all parts together.")] = LIMIT,
) -> None:
    """Runs the parts one after the other; see ``HELP``."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part under way is ended too
    console = Console(highlight=False)
    scratch = Path(tempfile.mkdtemp(prefix="patchpipe-gpu-"))
    try:
        sys.exit(_run(console, chosen(part), out, cpu, nccl, wheels, seconds, scratch))
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(2)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(
    console: Console, parts: list[Part], out: Path | None, cpu: bool, nccl: Path | None, wheels: Path | None,
    seconds: float, scratch: Path,
) -> int:  # fmt: skip
    """The exit status."""
    site = machine.install(wheels, scratch) if wheels else None
    plain = machine.environment(None, site, scratch)
    with_nccl = machine.environment(nccl or machine.carried(), site, scratch)
    about = machine.asked(plain if cpu else with_nccl)
    why = _why_none(about, cpu)
    console.print(_headline(about, cpu))
    target = out or (RESULTS if about["gpus"] and not cpu else ELSEWHERE)
    results = Results(target, about, "python -m bench.gpu" + (" --cpu" if cpu else ""))
    setting = Setting("cpu" if cpu else "cuda", *(about[name] for name in ("card", "gpus", "nccl", "memory")))
    ended, fine = time.monotonic() + seconds, True
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        for part in parts:
            limit = CPU_LIMIT if cpu else min(part.limit, ended - time.monotonic())
            if why is not None or limit < 5:
                found = _skipped(part, why or "no time was left")
            else:
                env = with_nccl if part.nccl and not cpu else plain
                found = _watched(progress, part, setting, env, limit, scratch)
            results.put(part.letter, {**found, "when": time.strftime("%Y-%m-%d %H:%M:%S")})
            fine = fine and (found["status"] in MARKS)
            progress.console.print(_line(part, found), soft_wrap=True)
    console.print(f"results: {target}", soft_wrap=True)
    return 0 if fine else 1


def _watched(
    progress: Progress, part: Part, setting: Setting, env: dict[str, str], limit: float, scratch: Path
) -> dict[str, Any]:
    """Runs a part under a line that says how far it is."""
    task = progress.add_task(f"{part.letter}  {part.title}", total=None)

    def seen(rows: list[dict[str, Any]]) -> None:
        last = f": {rows[-1]['title']}" if rows else ""
        progress.update(task, description=escape(f"{part.letter}  {len(rows)} rows{last}")[:100])

    try:
        return run_part(part, setting, env, limit, scratch, seen)
    finally:
        progress.remove_task(task)


def _why_none(about: dict[str, Any], cpu: bool) -> str | None:
    """Why no part can run here.

    Raises:
        ValueError: Something is missing that can be brought.
    """
    if about["torch"] is None:
        raise ValueError("torch is not installed here: install a build for this machine's driver, see docs/gpu.md")
    if not cpu and not about["gpus"]:
        return f"torch {about['torch']} sees no CUDA device here (--cpu tries the code on tiny shapes)"
    if about["missing"]:
        raise ValueError(
            f"not installed here: {', '.join(about['missing'])}. Give --wheels DIR with their wheels, or run "
            f"`pip install --no-index --find-links DIR {' '.join(about['missing'])}`; see docs/gpu.md"
        )
    return None


def _skipped(part: Part, why: str) -> dict[str, Any]:
    return {"title": part.title, "status": "skipped", "why": why, "seconds": 0.0, "rows": []}


def _headline(about: dict[str, Any], cpu: bool) -> str:
    card = (
        f"{about['gpus']} × {about['card']}"
        if about["gpus"] and not cpu
        else "no GPU"
        if not cpu
        else "CPU, tiny shapes"
    )
    return f"{card}, torch {about['torch']}, diffusers {about['diffusers'] or 'missing'}"


def _line(part: Part, found: dict[str, Any]) -> str:
    mark = MARKS.get(found["status"], f"[red]{found['status']}[/]")
    counted = f", {len(found['rows'])} rows in {found['seconds']:.0f} s" if found["rows"] else ""
    why = f": {escape(found['why'])}" if "why" in found else ""
    return f"{part.letter}  {mark}{counted}  {escape(part.title)}{why}"


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command(help=HELP)(main)

if __name__ == "__main__":
    app(prog_name="python -m bench.gpu")
