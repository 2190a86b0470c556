"""What `mkdocs.yml` asks for before the pages of docs/ are rendered: the README becomes the first
page, and what a page links to outside docs/ is named by its path in the repository.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the index."""
    text = (ROOT / "README.md").read_text().replace("](docs/images/", "](images/")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page whose links all lead to other pages of the site, or to the web."""
    folder = ROOT if page.file.src_uri == "index.md" else ROOT / "docs"

    def change(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (folder / target).resolve().relative_to(ROOT)
        if path == Path("README.md"):
            return f"[{text}](index.md{anchor})"
        if path.suffix == ".md" and path.parts[0] == "docs":
            return f"[{text}]({path.relative_to('docs')}{anchor})"
        return text if str(path) in text else f"{text} (`{path}`)"

    return LINK.sub(change, markdown)
