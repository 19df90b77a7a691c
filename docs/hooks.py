"""What mkdocs does besides: results/ and the project's own pages in the site, and formulas as MathML."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds results/ and the project's own pages, which lie beside docs/."""
    results = [p for p in (ROOT / "results").rglob("*") if p.suffix in (".md", ".png", ".json", ".html")]
    for path in [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(results)]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and results/: side by side in the repository, the one in the other in the site."""
    if page.file.src_uri.startswith("results/"):
        return markdown.replace("](../../docs/", "](../../")
    return re.sub(r"\]\(\.\./((?:\.\./)*results/)", r"](\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML: no script and no font has to be fetched to see them."""
    return FORMULA.sub(
        lambda m: convert(unescape(m[3]).strip(), display="block" if m[2] == "[" else "inline"), html
    )
