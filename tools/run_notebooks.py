"""Runs notebooks top to bottom in fresh kernels and fails at the first error; `--write` keeps the outputs in the file.

python tools/run_notebooks.py [--write] [NOTEBOOK ...]
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent


def run(path: Path, *, write: bool) -> None:
    """Run one notebook in its own folder.

    Raises:
      SystemExit: a cell raised; shows it.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    try:
        client.execute()
    except CellExecutionError as error:
        raise SystemExit(f"{path.name}: {error}") from None
    if write:
        clean(notebook)
        nbformat.write(notebook, path)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from machine to machine: the kernel's details, timestamps, and this machine's paths."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = output.text.replace(str(ROOT), "jaxpost").replace(str(Path.home()), "~")


def main(args: list[str]) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    # Without it, cached programs can hang on fake CPU devices (see tests/conftest.py).
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")
    chosen = [Path(arg).resolve() for arg in args if arg != "--write"]
    for path in chosen or sorted((ROOT / "notebooks").glob("*.ipynb")):
        start = time.perf_counter()
        run(path, write="--write" in args)
        print(f"{path.name}: ran in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
