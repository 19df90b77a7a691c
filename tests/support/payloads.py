"""Texts that a stranger's file, a model, a tokenizer or a corpus may hold, and results made of them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")

PAYLOADS = [
    "<script>window.owned = 1</script>",
    "</script><script>window.owned = 1</script>",
    '<img src=x onerror="window.owned = 1">',
    '"\' onmouseover="window.owned = 1" autofocus onfocus=\'window.owned = 1',
    "</td></table></iframe><svg onload=window.owned=1>",
    "[link=javascript:window.owned=1]click[/link]",
    '[link=x" onmouseover="window.owned=1]hover[/link]',
    "[/b] [bold [red] [/",
    '<a href="javascript:window.owned=1">click</a>',
    "{{ 7 * 7 }}{% raw %}{{ cycler.__init__.__globals__ }}",
    "\x1b[31mred\x1b[0m\x1b[2J\x1b]0;title\x07\x9b31m",
    "\x1b]8;;javascript:window.owned=1\x1b\\click\x1b]8;;\x1b\\",
    "\u202eevil\u202c\u2066\u2028\r\n\t\x00\x7f\ud800",
    "<!--<script>]]>&lt;&#60;</textarea></style></title>",
    "w" * 5_000,
]

BARE_CONTROLS = [chr(c) for c in (*range(0x20), 0x7F, *range(0x80, 0xA0), 0x202E, 0x2066) if c != 0x0A]
"""Characters of which none may reach a terminal or a page."""


def poisoned(value: Any, payload: str, keep: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> Any:
    """A copy of a result in which every text is the payload.

    Args:
        value: the result.
        payload: the text.
        keep: fields of dataclasses that stay as they are.
        names: keys of dictionaries that stay as they are; the others become the payload too.
    """

    def again(part: Any) -> Any:
        return poisoned(part, payload, keep, names)

    if isinstance(value, str):
        return payload
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = [f.name for f in dataclasses.fields(value) if f.name not in keep and f.init]
        return dataclasses.replace(value, **{name: again(getattr(value, name)) for name in changed})
    if isinstance(value, dict):
        return {k if k in names else again(k): again(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(again, value))
    if isinstance(value, list | tuple):
        return type(value)(map(again, value))
    return value


@pytest.fixture(scope="module")
def chromium():
    """A browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def check_nothing_runs(browser: Any, path: Path, width: int = 1000) -> Any:
    """Opens a page, points at everything and clicks every link; no script of a payload may run.

    Returns:
        What the body's text was.
    """
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(240_000)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on(
        "request", lambda r: None if r.url.startswith(("file:", "blob:", "data:")) else faults.append(r.url)
    )
    page.goto(path.as_uri())
    page.wait_for_timeout(300)
    found = page.evaluate(
        """() => {
          const links = [...document.querySelectorAll("[href]")].map((a) => a.getAttribute("href"));
          for (const e of document.querySelectorAll("body *")) {
            for (const type of ["mouseover", "mouseenter", "focus"]) e.dispatchEvent(new Event(type));
            for (const { name } of e.attributes) if (name.startsWith("on")) links.push(name);
          }
          return { owned: window.owned, links, text: document.body.textContent, title: document.title };
        }"""
    )
    page.close()
    assert found["owned"] is None
    assert [link for link in found["links"] if link.lower().startswith(("javascript", "on", "data"))] == []
    assert not faults, faults
    return found["text"]
