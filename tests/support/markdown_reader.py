"""Markdown as a reader of it finds it."""

from markdown_it import MarkdownIt

markdown = MarkdownIt("commonmark", {"html": True}).enable("table")


def tables_of(card: str) -> list[list[list[str]]]:
    """The tables of a page with YAML metadata: rows of cells of text."""
    tables: list[list[list[str]]] = []
    for token in markdown.parse(card.split("---\n", 2)[2]):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and tables and token.level > 3:
            tables[-1][-1].append("".join(child.content for child in token.children or []))
    return tables
