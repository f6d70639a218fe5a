"""The project about itself: what is installed, what is tracked, and that the README's commands exist."""

import ast
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jaxpost import cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
SOURCES = sorted((ROOT / "jaxpost").rglob("*.py"))
MAKEFILE = (ROOT / "Makefile").read_text()
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))


def tracked() -> list[Path]:
    """Text files that git tracks, or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.splitlines()]
    return [path for path in files if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def test_no_paths_of_a_machine_and_no_package_index_in_tracked_files():
    paths = re.compile(r"(?<![\w.~])/(home|root|Users|work|opt)/\w")
    index = re.compile(r"index[-]url|find[-]links=|https?://\S*/(simple|packages)/|file:///")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if paths.search(line) or index.search(line)
    ]
    assert not found, "\n".join(found)


def test_files_and_functions_hold_one_idea():
    """Past 400 lines a file holds two ideas; past 60 a function does."""
    long = [
        f"{path.relative_to(ROOT)}: {n} lines" for path in SOURCES if (n := len(path.read_text().splitlines())) > 400
    ]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name}: {node.end_lineno - node.lineno} lines")
    assert not long, "\n".join(long)


def test_importing_jaxpost_imports_nothing_else():
    script = "import sys; before = set(sys.modules); import jaxpost; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == ["jaxpost"]


def test_the_whole_package_imports_without_torch_tensorflow_or_nnx():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print([name for name in ("torch", "tensorflow", "flax.nnx", "sklearn", "IPython") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # flax itself loads flax.nnx where it can; what counts is that no file of ours asks for it
    assert set(ast.literal_eval(done.stdout)) <= {"flax.nnx"}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def test_dependencies_are_those_that_are_imported():
    owners = importlib.metadata.packages_distributions()
    used = {name for path in SOURCES for name in imported(path)} - set(sys.stdlib_module_names) - {"jaxpost"}
    extras = [
        line
        for name in ("math", "tensorboard", "wandb", "trackio", "demo")
        for line in PROJECT["optional-dependencies"][name]
    ]
    declared, optional = requirements(PROJECT["dependencies"]), requirements(extras)
    by_import = {name: {canonicalize_name(owner) for owner in owners.get(name, [name])} for name in used}
    undeclared = {name for name, found in by_import.items() if not found & (declared.keys() | optional.keys())}
    assert not undeclared
    unused = declared.keys() - set().union(*by_import.values())
    assert unused <= {"jinja2"}  # transformers' chat templates need it and do not declare it


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_locks_hold_versions_only_and_satisfy_the_project(lock):
    pins = [Requirement(line) for line in lock.read_text().splitlines() if line]
    assert all(pin.url is None and len(pin.specifier) == 1 and "==" in str(pin.specifier) for pin in pins)
    wanted = requirements(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    wanted |= requirements([*extras["test"], *extras["parity" if lock.stem == "parity" else "dev"]])
    wanted.pop("jaxpost")
    for name, requirement in wanted.items():
        versions = [str(pin.specifier)[2:] for pin in pins if canonicalize_name(pin.name) == name]
        assert versions, f"{lock.name} lacks {name}"
        assert all(requirement.specifier.contains(version) for version in versions), (lock.name, name)


def test_the_locks_span_the_supported_stacks():
    jax = {path.stem: re.search(r"^jax==(.*)$", path.read_text(), re.M)[1] for path in LOCKS}
    assert jax["py311"].startswith("0.10.")
    assert jax["parity"] == jax["py311"]
    assert jax["py312"].startswith("0.12.")


def test_the_makefile_installs_what_the_demo_extra_says():
    packages = re.search(r"^DEMO_PACKAGES := (.*)$", MAKEFILE, re.M)[1].split()
    assert packages == PROJECT["optional-dependencies"]["demo"]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))


def test_every_target_is_in_the_help_and_phony():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets()
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
    assert set(phony) == targets()


def commands(document: Path) -> list[list[str]]:
    """Lines of a document's shell blocks, without prompts and comments."""
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", document.read_text(), re.S)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_in_documents_exist(document):
    """`make X` names a target, `jaxpost ...` parses, and a script or preset that is named is there."""
    for words in commands(document):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word and not word.startswith("-")} <= targets(), words
        if words[0] == "jaxpost":
            own, flags = cli.split_flags([word for word in words[1:] if word not in ("|", ">")])
            assert flags or cli.parse(own), words
        for word in words:
            if re.match(r"(configs|tools|notebooks|docs|\.ci)/[\w./-]+$", word) and "PRESET" not in word:
                assert (ROOT / word).exists(), f"{document.name}: {word}"


def test_links_in_documents_lead_somewhere():
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "configs" / "PAPERS.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_notebooks_hold_clean_outputs():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert code
        for cell in code:
            assert all(output["output_type"] != "error" for output in cell["outputs"])
            assert "execution" not in cell["metadata"]


def test_test_modules_have_names_of_their_own():
    """Without packages, pytest tells modules apart by name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if "parity" not in path.parts]
    assert len(names) == len(set(names))
