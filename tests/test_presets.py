"""Every preset is read, checked, described in configs/PAPERS.md, and run for three steps on a tiny model."""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxpost.config_check import check
from jaxpost.config_flags import apply_flags
from jaxpost.config_io import load

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs").glob("*/*.yaml"))
SPEC = importlib.util.spec_from_file_location("papers", ROOT / "tools" / "papers.py")
papers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(papers)


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def tiny(preset: Path, model: Path, folder: Path) -> list[str]:
    """Flags that make a preset small: a random model, a local file, few steps, short rows, every device."""
    data = folder / "data.jsonl"
    turns = [
        [{"role": "user", "content": f"What is {i} + {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]
        for i in range(40)
    ]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    config = load(preset)
    weights = [source.weight for source in config.data.train]
    train = ", ".join(f"{{path: {data}, weight: {'null' if w is None else w}}}" for w in weights)
    return [
        *("--model.path", str(model), "--model.revision", "null", "--model.tokenizer", "null"),
        *("--model.chat_template", "null", "--model.compute_dtype", "float32", "--model.param_dtype", "float32"),
        *("--data.train", f"[{train}]", "--data.eval", f"[{{path: {data}, limit: 8}}]"),
        *("--data.seq_len", "128", "--data.workers", "0", "--mesh", "{fsdp: -1}"),
        *("--train.steps", "3", "--train.batch_size", "16", "--train.microbatches", "2", "--train.eval_every", "0"),
        *("--optim.schedule.warmup", "0.1", "--optim.schedule.decay", "0.2"),
        *("--train.eval_batches", "1", "--train.samples.prompts", "Hi", "--train.samples.max_tokens", "4"),
        *("--run.dir", str(folder / "run"), "--run.loggers", "[]"),
    ]


@pytest.mark.parametrize("preset", PRESETS, ids=ids)
def test_preset_is_sound_and_says_where_it_comes_from(preset):
    config = check(load(preset))
    header = papers.read_header(preset)
    assert str(preset.relative_to(ROOT)) in header["command"] or header["command"].startswith("make ")
    assert config.run.name == preset.stem, "its runs are found by the preset's name"


@pytest.mark.parametrize("preset", PRESETS, ids=ids)
def test_preset_runs_three_steps_on_a_tiny_model(preset, tiny_model, tmp_path, monkeypatch):
    from jaxpost import assemble

    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    config = check(apply_flags(load(preset), tiny(preset, tiny_model, tmp_path)))
    result = assemble.train(config)
    assert result.step == 3
    assert result.stopped is None
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 3
    assert all(0 <= loss < 20 for loss in losses)
    exported = tmp_path / "run" / "export"
    assert (exported / ("adapter_config.json" if config.adapter.kind == "lora" else "config.json")).is_file()


def test_the_page_of_papers_is_made_from_the_headers():
    assert (ROOT / "configs" / "PAPERS.md").read_text(encoding="utf-8") == papers.render(), "run `make papers`"


HEADER = "# Does a thing.\n" + "".join(f"# {field}: text\n" for field in papers.FIELDS)

HEADERS = {
    "no header": ("method: sft\n", "has no header"),
    "field missing": (HEADER.replace("# time: text\n", ""), "the header lacks time"),
    "unknown field": (HEADER + "# speed: 3\n", "is none of source, command"),
    "empty field": (HEADER.replace("# time: text", "# time:"), "is none of"),
    "out of order": (
        "# T\n# command: c\n# source: s\n" + "".join(HEADER.splitlines(True)[3:]),
        "order is source, command",
    ),
}


@pytest.mark.parametrize(("text", "message"), HEADERS.values(), ids=HEADERS)
def test_headers_that_lack_something_are_turned_down(text, message, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(papers.HeaderError, match=message):
        papers.read_header(tmp_path / "p.yaml")


def test_headers_go_on_over_lines(tmp_path):
    (tmp_path / "p.yaml").write_text(HEADER + "#   and more\nmethod: sft\n")
    assert papers.read_header(tmp_path / "p.yaml")["note"] == "text and more"
