"""What mkdocs is told beside its settings: pages that lie outside docs/, and mentions of pages as links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
BORROWED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# A page's name in a sentence, where no link and no code surrounds it.
_MENTION = re.compile(r"(?<!\]\()(?<![\[/\w`])docs/(\w+)\.md(?![\]`])")
_CODE = re.compile(r"^(?: {4}[^\n]*|```.*?^```)$", flags=re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """README, CONTRIBUTING and CHANGELOG are pages too; their links to docs/ become links between pages."""
    for name, source in BORROWED.items():
        text = (ROOT / source).read_text()
        for page, original in BORROWED.items():
            text = text.replace(f"]({original})", f"]({page})")
        files.append(File.generated(config, name, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """`docs/NAME.md` in a sentence becomes a link to that page; a word for manual/examples.py goes from its block."""
    markdown = markdown.replace("```console fails\n", "```console\n")  # a second word is none of the extension's syntax

    def linked(match: re.Match[str]) -> str:
        name = f"{match[1]}.md"
        return f"[{match[1]}]({name})" if files.get_file_from_path(name) else match[0]

    parts: list[str] = []
    end = 0
    for code in _CODE.finditer(markdown):
        parts += [_MENTION.sub(linked, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _MENTION.sub(linked, markdown[end:])])
