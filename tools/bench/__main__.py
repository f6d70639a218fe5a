"""Speed and memory against other libraries on this machine: the same model, batch, dtype and threads, in one run.

    make bench            # or: python tools/bench --tasks full,decode8 --rounds 3

Each measurement is a process of its own, the libraries take turns (A B A B ...), each keeps its best round, and the
table prints the ratio peer / jaxpost: above 1 jaxpost is faster. Memory is the process's peak resident size.
Compile time is apart: it is paid once a run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import generation
import online
import preference
import search
import training
from common import Task

from jaxpost.host_memory import HUGE_PAGES, KEPT, TUNABLE

TASKS: dict[str, Task] = training.TASKS | generation.TASKS | online.TASKS | preference.TASKS | search.TASKS
THREADS = "2"


def worker(library: str, name: str, folder: str) -> None:
    if library == "torch":
        import torch

        torch.set_num_threads(int(THREADS))
    result = TASKS[name].libraries[library](name, folder)
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(result))


def measure(library: str, name: str, folder: str) -> dict:
    """Runs one measurement in its own process and returns what it printed."""
    env = dict(os.environ, OMP_NUM_THREADS=THREADS, JAX_PLATFORMS="cpu", PYTHONWARNINGS="ignore")
    if library.startswith("jaxpost"):
        # As `jaxpost train` does where the kernel leaves it to programs.
        env.setdefault(TUNABLE, KEPT if name == "grpo" else HUGE_PAGES)
    command = [sys.executable, str(Path(__file__).parent), "--worker", library, "--tasks", name, "--model", folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{library} {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, folder: str, rounds: int) -> dict[str, dict]:
    """The best round of each library."""
    best: dict[str, dict] = {}
    for _ in range(rounds):
        for library in TASKS[name].libraries:
            result = measure(library, name, folder)
            result["best"] = min(result["seconds"])
            if library not in best or result["best"] < best[library]["best"]:
                best[library] = result
    return best


def row(task: Task, best: dict[str, dict]) -> str:
    ours = best["jaxpost"]
    cells = [task.title, f"{ours['best']:.2f} s ({task.tokens / ours['best']:.0f} tok/s)"]
    for peer in ("torch", "llama.cpp"):
        if peer not in best:
            cells += ["", ""]
            continue
        ratio = f"{best[peer]['best'] / ours['best']:.2f}"
        if peer in task.targets:
            ratio += f" (target {task.targets[peer]:g})"
        cells += [f"{best[peer]['best']:.2f} s ({task.tokens / best[peer]['best']:.0f} tok/s)", ratio]
    libraries = [x for x in ("jaxpost", "torch", "llama.cpp") if x in best]
    cells.append(" / ".join(f"{best[x]['peak_gib']:.2f}" for x in libraries))
    cells.append(" / ".join(f"{best[x]['first'] * 1000:.0f}" for x in libraries if "first" in best[x]))
    cells.append(f"{ours['roof']:.0%}" if "roof" in ours else "")
    cells.append(f"{ours.get('compile', 0):.1f} s")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of the libraries")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        parser.error(f"unknown tasks {', '.join(unknown)}; there are {', '.join(TASKS)}")
    if arguments.worker:
        worker(arguments.worker, arguments.tasks, arguments.model)
        return
    from jaxpost.weights.resolve import resolve_model

    folder = str(Path(resolve_model(arguments.model)))
    heads = ["float32, 2 threads", "jaxpost", "torch", "torch / jaxpost", "llama.cpp", "llama.cpp / jaxpost"]
    heads += ["peak GiB (in this order)", "first token, ms", "of bandwidth", "compile"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in names:
        best = compare(name, folder, arguments.rounds)
        print(row(TASKS[name], best), flush=True)
        if "split" in best["jaxpost"]:
            parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in best["jaxpost"]["split"].items())
            print(f"\n{TASKS[name].title}: {parts}\n", flush=True)
        others = {name: found for name, found in best.items() if name not in ("jaxpost", "torch", "llama.cpp")}
        for library, found in others.items():
            print(f"\n{library}: {found['best']:.2f} s, {found['best'] / best['jaxpost']['best']:.2f} times jaxpost's")
        for found in best.values():
            if "note" in found:
                print(f"\n{found['note']}", flush=True)


if __name__ == "__main__":
    main()
