"""Hooks of the docs site: pages from outside docs/, tables of options, formulas, links to files that are in no page."""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
OPTIONS = re.compile(r"^\{\{ options of (\w+) \}\}$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add README as the first page, CONTRIBUTING, and results with their pictures."""
    outside = {"index.md": ROOT / "README.md", "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md"}
    for suffix in ("md", "png"):
        outside |= {str(path.relative_to(ROOT)): path for path in (ROOT / "results").rglob(f"*.{suffix}")}
    for name, path in outside.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Lead links to where pages are in the site, and leave the text alone of those to files that are in none."""
    name = page.file.src_uri
    place = {"index.md": ROOT, "CONTRIBUTING.md": ROOT}.get(name, ROOT if name.startswith("results/") else HERE)
    base = (place / ("" if place == ROOT and "/" not in name else name)).parent if "/" in name else place

    def led(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (base / target).resolve()
        path = path / "README.md" if path.is_dir() else path
        if path.is_relative_to(HERE):
            inside = str(path.relative_to(HERE))
        else:
            inside = {"README.md": "index.md"}.get(str(path.relative_to(ROOT)), str(path.relative_to(ROOT)))
        if files.get_file_from_path(inside) is None:
            if path.exists():
                return text
            return match[0]  # which the strict build refuses
        up = "../" * name.count("/")
        return f"{picture}[{text}]({up}{inside}{anchor})"

    return OPTIONS.sub(lambda match: options_table(match[1]), LINK.sub(led, markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw without a script."""

    def drawn(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(drawn, content)


def options_table(command: str) -> str:
    """Return the options of a command as Markdown tables, from the fields that the command line is made of."""
    from codistill.cli import flags, options
    from codistill.settings.config import default_config

    found = flags.option_flags(options.OPTIONS[command])
    if command in options.FIRST:
        found += flags.setting_flags(default_config("mfef").values())
    groups: dict[str, list[flags.Flag]] = {}
    for flag in found:
        groups.setdefault("" if flag.group in ("run", "") else flag.group, []).append(flag)
    lines: list[str] = []
    for title, members in groups.items():
        lines += ["", f"**{title} (those of mfef)**" if title == "method" else f"**{title}**" if title else "", ""]
        lines += ["| option | meaning | default |", "|---|---|---|"]
        for flag in members:
            names = ", ".join(f"`{each}`" for each in flag.spellings()) or f"`{flag.metadata['positional']}`"
            default = flags.default_text(flag).removeprefix("(default: ").removeprefix("(").removesuffix(")")
            text = flag.text if flag.default is not None else flag.text.replace("None: ", "Default: ")
            lines.append(f"| {names} | {text} | {default} |".replace("||", "|"))
    return "\n".join(lines).replace("{", "&#123;").replace("<", "&lt;")
