"""The command line: exit codes, one sentence for an error, help that teaches. What commands do is tested elsewhere."""

import errno
import json
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import jaxpost
from jaxpost import cli, cli_help, disk
from jaxpost.config_io import METHODS, load, loads
from jaxpost.report.page import write as write_page
from jaxpost.text.messages import DataError
from jaxpost.weights.files import replaced_folder

PRESET = "method: sft\ndata:\n  train: [{path: a.jsonl}]\n"
COMMANDS = (
    ["train"],
    ["generate"],
    ["chat"],
    ["convert"],
    ["data", "inspect"],
    ["config", "show"],
    ["config", "diff"],
    ["lab", "train"],
    ["lab", "compare"],
    ["lab", "search"],
    ["report"],
    ["search"],
    ["search-curve"],
    ["search-export"],
    ["env"],
)


@pytest.fixture
def preset(tmp_path: Path) -> str:
    path = tmp_path / "p.yaml"
    path.write_text(PRESET)
    return str(path)


@pytest.fixture
def assemble(monkeypatch) -> SimpleNamespace:
    """Records calls in place of the real module, which would load a model."""
    fake, calls = ModuleType("jaxpost.assemble"), []

    def record(name, result):
        return lambda *args, **kwargs: calls.append((name, args, kwargs)) or result

    fake.train = record("train", SimpleNamespace(exit_code=0))
    fake.writes = lambda: False
    fake.generate = record("generate", [{"prompt": "a", "text": "b", "finish": "stop"}])
    fake.ask_server = record("ask_server", [{"prompt": "a", "text": "b", "finish": "stop"}])
    fake.read_prompts = lambda path, notes: (path.read_text().split(), [{"n": 2}, {}])
    fake.Conversation = record("Conversation", "a talk")
    fake.chat = record("chat", None)
    fake.convert = record("convert", "written")
    fake.inspect = record("inspect", "rows")
    fake.environment = record("environment", {"host": "h", "versions": {"jax": "1"}})
    monkeypatch.setitem(sys.modules, "jaxpost.assemble", fake)
    monkeypatch.setattr(jaxpost, "assemble", fake, raising=False)
    return SimpleNamespace(module=fake, calls=calls)


def run(*args: str) -> int:
    """The exit code of a command, however it ends."""
    try:
        return cli.main(args)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_nothing_slow_is_imported_before_a_command_computes(preset):
    """The help, complaints and `config` are quick because jax and its kin are not imported at all."""
    script = f"""
import sys
from jaxpost.cli import main
for args in (["--help"], ["train", "--help"], ["generate", "--help"], ["train", {preset!r}, "--help"],
             ["train", "none.yaml"], ["train", {preset!r}, "--optim.lrr", "1"], ["config", "show", {preset!r}]):
    try:
        main(args)
    except SystemExit:
        pass
slow = {{"jax", "jaxlib", "numpy", "flax", "optax", "transformers", "datasets", "torch"}} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_that_is_named_runs_the_command():
    done = subprocess.run([sys.executable, "-m", "jaxpost", "tune"], capture_output=True, text=True, check=False)
    assert done.returncode == cli.USAGE
    assert "invalid choice: 'tune'" in done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_examples_that_parse(command, capsys):
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    examples = re.findall(r"^  jaxpost (.*?)(?:  .*)?$", text.split("examples:")[1], flags=re.M)
    assert examples
    for example in examples:
        words = [word.strip("'\"") for word in re.findall(r"'[^']*'|\"[^\"]*\"|\S+", example.split(" > ")[0])]
        own, flags = cli.split_flags(words)
        options = cli.parse(own)
        assert " ".join(words).startswith(" ".join(command))
        assert options.takes_flags or not flags


def test_the_main_help_names_every_command(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(command[0] in text for command in COMMANDS)
    assert text.startswith("usage: jaxpost")
    assert cli_help.MAIN in text


def test_help_of_a_preset_shows_its_values(preset, capsys):
    assert run("train", preset, "--optim.lr", "3e-5", "--help") == 0
    text = capsys.readouterr().out
    assert "--optim.lr FLOAT" in text
    assert "(default: 3e-05)" in text


MISTAKES = {
    "no command": ([], "required"),
    "unknown command": (["tain"], "invalid choice: 'tain'"),
    "no preset": (["train"], "train needs a preset, before any flag"),
    "flag before preset": (["train", "--optim.lr", "1", "PRESET"], "train needs a preset, before any flag"),
    "no such preset": (["train", "none.yaml"], "none.yaml: no such file"),
    "unknown setting": (["train", "PRESET", "--optim.lrr", "1"], "--optim.lrr: unknown flag; did you mean lr?"),
    "unknown option": (["train", "PRESET", "--lr", "1"], "unrecognized arguments: --lr 1"),
    "impossible value": (
        ["train", "PRESET", "--train.batch_size", "3", "--train.microbatches", "2"],
        "not a multiple of",
    ),
    "setting for a command without": (["env", "--optim.lr", "1"], "env takes no settings, but got --optim.lr"),
    "no prompt": (["generate", "m"], "generate needs a prompt"),
    "no prompt file": (["generate", "m", "--file", "none.txt"], "none.txt"),
    "bad assignment": (["generate", "m", "x", "--set", "top_p"], "--set top_p: write NAME=VALUE"),
    "no server": (["generate", "-", "x"], "MODEL -, --server-model and --policy-version need --server URL"),
    "name without server": (["generate", "m", "x", "--server-model", "n"], "need --server URL"),
    "bad number": (["generate", "m", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
}


@pytest.mark.parametrize(("args", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_give_a_sentence_and_exit_code_2(args, message, preset, assemble, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert run(*(preset if arg == "PRESET" else arg for arg in args)) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert not assemble.calls


def test_train_passes_on_the_resolved_configuration(preset, assemble):
    assert run("train", preset, "--optim.kind", "lion", "--train.steps", "7") == 0
    ((name, (config,), kwargs),) = assemble.calls
    assert name == "train"
    assert (config.optim.kind, config.train.steps) == ("lion", 7)
    assert kwargs["command"] == ["jaxpost", "train", preset, "--optim.kind", "lion", "--train.steps", "7"]


def test_a_run_ends_with_its_page(preset, assemble, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2.0}\n')
    assemble.module.train = lambda *_, **__: SimpleNamespace(exit_code=0, folder=tmp_path / "run")
    assemble.module.writes = lambda: True
    assert run("train", preset) == 0
    assert str(tmp_path / "run" / "report.html") in capsys.readouterr().out
    assert "<svg" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", [130, 143])
def test_a_stopped_run_exits_as_its_signal_does(code, preset, assemble):
    assemble.module.train = lambda *_, **__: SimpleNamespace(exit_code=code)
    assert run("train", preset) == code


def raising(error):
    def train(*_, **__):
        raise error

    return train


def test_a_failed_run_exits_with_1_and_shows_where_only_on_request(preset, assemble, capsys, monkeypatch):
    assemble.module.train = raising(RuntimeError("disk full"))
    assert run("train", preset) == 1
    err = capsys.readouterr().err
    assert err == "jaxpost: failed: RuntimeError: disk full\n(--debug shows where)\n"
    assert run("train", preset, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("JAXPOST_DEBUG", "1")
    assert run("train", preset) == 1
    assert "Traceback" in capsys.readouterr().err


def full(*path):
    return OSError(errno.ENOSPC, "No space left on device", *path)


def test_a_full_disk_is_told_with_the_file_where_it_is_known(preset, assemble, capsys, tmp_path):
    words = "jaxpost: failed: the disk is full, or a limit on it reached"
    assemble.module.train = raising(full("runs/r"))
    assert run("train", preset) == 1
    assert capsys.readouterr().err.startswith(f"{words}, while writing runs/r; free some space and run the same")
    assemble.module.train = raising(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert run("train", preset) == 1
    assert capsys.readouterr().err.startswith(f"{words} ([Errno {errno.EDQUOT}] Disk quota exceeded); free some space")
    assemble.module.train = raising(OSError("1000 requested and 24 written"))  # NumPy's
    assert run("train", preset) == 1
    assert capsys.readouterr().err.startswith(words)

    def generate(*_, **__):
        yield {"prompt": "a", "text": "b", "finish": "stop"}
        raise full()

    assemble.module.generate = generate
    assert run("generate", "m", "a", "--out", str(tmp_path / "o.jsonl")) == 1
    assert capsys.readouterr().err.startswith(f"{words}, while writing {tmp_path / 'o.jsonl'}; free some space")


def test_a_full_disk_names_what_was_written(tmp_path):
    """RLIMIT_FSIZE makes the file system refuse further bytes."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, unlimited[1]))
    try:
        for write in (partial(write_page, tmp_path / "report.html"), partial(copy_into, tmp_path / "model")):
            with pytest.raises(OSError, match="File too large") as caught:
                write("x" * 1000)
            assert disk.told(caught.value).split(" while writing ")[1].startswith(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(tmp_path.glob(".report*"))


def copy_into(folder, text):
    with replaced_folder(folder, overwrite=False) as new, (new / "a").open("w") as file:
        file.write(text)


def test_a_value_error_is_the_users_only_where_jaxpost_raised_it(preset, assemble, capsys):
    assemble.module.train = lambda *_, **__: loads("method: sfd")
    assert run("train", preset) == 2
    assert capsys.readouterr().err.startswith("jaxpost: error: <text>: method: 'sfd'")
    assemble.module.train = raising(DataError("a.jsonl:1: bad"))  # here, as from a worker, no module of jaxpost raises
    assert run("train", preset) == 2
    assert capsys.readouterr().err == "jaxpost: error: a.jsonl:1: bad\n"
    assemble.module.train = raising(FileExistsError("out exists already"))
    assert run("train", preset) == 2
    assert capsys.readouterr().err == "jaxpost: error: out exists already\n"
    assemble.module.train = lambda *_, **__: json.loads("{")
    assert run("train", preset) == 1
    assert capsys.readouterr().err.startswith("jaxpost: failed: JSONDecodeError")


def test_interrupts_exit_with_130(preset, assemble, capsys):
    assemble.module.train = raising(KeyboardInterrupt())
    assert run("train", preset) == 130
    assert capsys.readouterr().err == "jaxpost: interrupted\n"


def test_generate_takes_prompts_from_arguments_files_and_standard_input(assemble, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("b\n\nc\n")
    assert run("generate", "m", "a", "--file", str(tmp_path / "p.txt"), "--temperature", "0.5", "--system", "s") == 0
    ((_, args, kwargs),) = assemble.calls
    assert args == ("m", ["a", "b", "c"])
    assert kwargs.pop("progress") is sys.stderr
    settings = {"seed": 0, "chat": True, "rows": 32, "shape": {}, "thinking": {}, "speculate": 0, "out": None}
    assert kwargs.pop("own") == [{}, {"n": 2}, {}]
    assert kwargs == {"sampling": {"temperature": 0.5}, "system": "s", **settings}
    assert capsys.readouterr().out == "> a\nb\n\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, read=lambda: "x\ny\n"))
    assert (
        run(
            "generate",
            "m",
            "--raw",
            "--json",
            "--set",
            "top_p=0.9",
            "--set",
            "stop=[a, b]",
            "--choice",
            "u",
            "--speculate",
            "4",
            "--think-max",
            "9",
            "--waits",
            "1",
        )
        == 0
    )
    _, args, kwargs = assemble.calls[1]
    assert args == ("m", ["x", "y"])
    assert (kwargs["sampling"], kwargs["chat"]) == ({"top_p": 0.9, "stop": ["a", "b"]}, False)
    assert (kwargs["shape"], kwargs["speculate"]) == ({"choice": ["u"]}, 4)
    assert (kwargs["thinking"], kwargs["own"]) == ({"max": 9, "waits": 1}, None)
    assert json.loads(capsys.readouterr().out)["text"] == "b"


def test_generate_asks_a_server(assemble):
    url = "http://localhost:8000/v1"
    assert run("generate", "-", "a", "--server", url, "--server-model", "big", "--rows", "4", "--set", "n=2") == 0
    ((name, args, kwargs),) = assemble.calls
    assert (name, args) == ("ask_server", (url, ["a"]))
    assert kwargs.pop("progress") is sys.stderr
    remote = {"name": "big", "model": None, "requests": 4, "policy_version": 0, "shape": {}}
    assert kwargs == remote | {"sampling": {"n": 2}, "seed": 0, "system": None, "chat": True, "own": None, "out": None}
    assert run("generate", "m", "a", "--server", url, "--policy-version", "3") == 0
    kwargs = assemble.calls[1][2]
    assert (kwargs["name"], kwargs["model"], kwargs["policy_version"]) == (None, "m", 3)
    assert run("generate", "m", "a", "--server", url, "--choice", "yes", "--choice", "no") == 0
    assert assemble.calls[2][2]["shape"] == {"choice": ["yes", "no"]}
    for asked in (["--think-max", "3"], ["--speculate", "4"], ["--set", "num_beams=3"]):
        assert run("generate", "m", "a", "--server", url, *asked) == 2


def test_failed_answers_are_told_and_counted(assemble, capsys):
    assemble.module.generate = lambda *_, **__: [{"prompt": "a", "text": "", "finish": "error", "error": "too long"}]
    assert run("generate", "m", "a") == 1
    out, err = capsys.readouterr()
    assert out == "> a\n(failed: too long)\n\n"
    assert "1 answers failed" in err


def test_chat_passes_on_its_arguments(assemble, capsys):
    assert run("chat", "m", "--max-tokens", "9", "--set", "top_k=4", "--system", "s", "--seed", "2") == 0
    (_, args, kwargs), (_, talk, _) = assemble.calls
    assert args == ("m",)
    assert kwargs == {"system": "s", "sampling": {"max_tokens": 9, "top_k": 4}, "seed": 2, "thinking": {}}
    assert talk[0] == "a talk"
    assert run("chat", "m", "--think-min", "2", "--think-max", "9", "--waits", "1") == 0
    assert assemble.calls[2][2]["thinking"] == {"min": 2, "max": 9, "waits": 1}


def test_the_other_commands_pass_on_their_arguments(preset, assemble, tmp_path, capsys):
    assert run("convert", "m.gguf", str(tmp_path / "out"), "--dtype", "bfloat16") == 0
    assert assemble.calls[-1] == ("convert", ("m.gguf", tmp_path / "out"), {"dtype": "bfloat16"})
    assert run("data", "inspect", preset, "--rows", "5", "--color", "always", "--data.seq_len", "64") == 0
    _, (config,), kwargs = assemble.calls[-1]
    assert config.data.seq_len == 64
    assert kwargs == {"rows": 5, "color": True}
    assert run("data", "inspect", preset) == 0
    assert assemble.calls[-1][2] == {"rows": 3, "color": False}
    assert run("env") == 0
    assert run("env", "--json") == 0
    table, text = capsys.readouterr().out.split("{", 1)
    assert table.endswith("host          h\nversions jax  1\n")
    assert json.loads("{" + text) == {"host": "h", "versions": {"jax": "1"}}


def test_config_show_is_itself_a_preset_and_diff_names_what_differs(preset, tmp_path, capsys):
    assert run("config", "show", preset, "--optim.kind", "muon") == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load(shown).optim.kind == "muon"
    assert run("config", "diff", preset, str(shown), "--train.steps", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "optim.kind: adamw -> muon" in lines
    assert "train.steps: null -> 3" in lines
    assert run("config", "diff", preset, preset) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_a_reader_that_leaves_early_is_no_error(preset):
    command = [sys.executable, "-m", "jaxpost.cli", "config", "show", preset]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_settings_are_told_from_a_commands_own_options():
    own, flags = cli.split_flags(
        ["inspect", "p", "--rows", "2", "--mesh.fsdp", "-1", "--adapter", "{kind: lora}", "--color", "never"]
    )
    assert own == ["inspect", "p", "--rows", "2", "--color", "never"]
    assert flags == ["--mesh.fsdp", "-1", "--adapter", "{kind: lora}"]
    assert set(METHODS) == {"sft", "rl", "preference", "reward", "search"}


def test_real_commands_on_a_tiny_model(tiny_model, tmp_path, capsys, monkeypatch):
    """Through the real assemble: convert, generate from the result, inspect, env; nothing replaced."""
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    assert run("convert", str(tiny_model), str(copy)) == 0
    assert "wrote" in capsys.readouterr().out
    assert run("convert", str(tiny_model), str(copy)) == 2
    assert "exists already" in capsys.readouterr().err

    answers = []
    for folder in (tiny_model, copy):
        assert run("generate", str(folder), "Hi", "--max-tokens", "4", "--json") == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert answers[0]["tokens"] <= 4
    assert run("generate", str(tmp_path / "none"), "Hi") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err

    (tmp_path / "adapter").mkdir()
    for content in ('{"base_model', "[]", '{"base_model_name_or_path": 3}'):
        (tmp_path / "adapter" / "adapter_config.json").write_text(content)
        assert run("convert", str(tmp_path / "adapter"), str(tmp_path / "merged")) == 2
        assert f"{tmp_path}/adapter/adapter_config.json" in capsys.readouterr().err

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "p.yaml").write_text(
        f"method: sft\nmodel: {{path: {copy}}}\ndata: {{train: [{{path: {tmp_path}/a.jsonl}}]}}\n"
    )
    assert run("data", "inspect", str(tmp_path / "p.yaml"), "--data.seq_len", "64") == 0
    assert "Yes?" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text("{\n")
    assert run("data", "inspect", str(tmp_path / "p.yaml"), "--data.seq_len", "64") == 2
    assert f"{tmp_path}/a.jsonl:1" in capsys.readouterr().err

    assert run("env", "--json") == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "cpu"
