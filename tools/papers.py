"""Writes configs/PAPERS.md from the presets' headers; `--check` only says whether it is up to date.

A preset begins with a header of comment lines: a sentence on what it does, then `# field: text` for each of
FIELDS (`note` may be left out); a line that begins with three spaces after the # goes on with the one before.

    python tools/papers.py [--check]
"""

import re
import sys
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FIELDS = ("source", "command", "hardware", "time", "expected", "measured", "note")
OPTIONAL = ("note",)
INTRO = """\
# Presets and their sources

Made by `make papers` from the presets' headers; do not edit. "measured" says whether the expected result was seen
with this code, or is the source's own number.
"""


class HeaderError(ValueError):
    """A preset's header lacks something; the message says what."""


def read_header(path: Path) -> dict[str, str]:
    """Title and fields of a preset's header.

    Raises:
      HeaderError: a field is missing, unknown, empty or out of order.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:])
    if not lines:
        raise HeaderError(f"{path}: has no header; the first line says what the preset does")
    header = {"title": lines[0].strip()}
    name = "title"
    for line in lines[1:]:
        field = re.match(r" (\w+): (.+)", line)
        if line.startswith("   "):
            header[name] += " " + line.strip()
        elif field and field[1] in FIELDS:
            name = field[1]
            header[name] = field[2].strip()
        else:
            raise HeaderError(f"{path}: header line '#{line}' is none of {', '.join(FIELDS)}")
    missing = [field for field in FIELDS if field not in header and field not in OPTIONAL]
    if missing:
        raise HeaderError(f"{path}: the header lacks {', '.join(missing)}")
    if list(header)[1:] != [field for field in FIELDS if field in header]:
        raise HeaderError(f"{path}: the header's order is {', '.join(FIELDS)}")
    return header


def render(configs: Path = CONFIGS) -> str:
    """The page, by method and then by name."""
    parts = [INTRO]
    for folder in sorted(path for path in configs.iterdir() if path.is_dir()):
        parts.append(f"## {folder.name}\n")
        for preset in sorted(folder.glob("*.yaml")):
            header = read_header(preset)
            link = preset.relative_to(configs).as_posix()
            rows = "\n".join(f"- {field}: {_text(field, header[field])}" for field in FIELDS if field in header)
            parts.append(f"### [{preset.stem}]({link})\n\n{header['title']}\n\n{rows}\n")
    return "\n".join(parts)


def _text(field: str, text: str) -> str:
    if field == "command":
        return f"`{text}`"
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def main(args: list[str]) -> int:
    page, text = CONFIGS / "PAPERS.md", render()
    if "--check" in args:
        fresh = page.exists() and page.read_text(encoding="utf-8") == text
        print("configs/PAPERS.md is up to date" if fresh else "configs/PAPERS.md is stale: run `make papers`")
        return 0 if fresh else 1
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
