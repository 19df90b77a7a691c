"""A page about one prompt through several decompositions of one MLP, side by side; it runs no script."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from mxd_lens.artifacts.page import BLUE, GREY, ORANGE, write_page
from mxd_lens.artifacts.tables import percent, printable
from mxd_lens.artifacts.tables import text_of as shown
from mxd_lens.evals.comparison import PARTS, Comparison, Decomposition, Predictions

IN_CELL = 3
"""Experts, and next tokens, that a cell shows; the others stand in its details."""

STYLE = f"""
:root {{ --panel: #f6f8fa; }}
@media (prefers-color-scheme: dark) {{ :root {{ --panel: #1b212a; }} }}
body {{ max-width: 100rem; padding-bottom: 12rem; }}
p, li {{ max-width: 60rem; }}
table.side {{ font-size: .84rem; font-variant-numeric: tabular-nums; }}
table.side td {{ min-width: 10.5rem; padding: .4rem .6rem; }}
table.side tbody td:hover, table.side td:focus {{ background: var(--panel); outline: none; }}
table.side td:focus-visible {{ outline: 2px solid {BLUE}; }}
table.side th {{ font-weight: normal; }} table.side thead th {{ font-weight: 600; }}
table.side > * > tr > th:first-child {{ position: sticky; left: 0; background: var(--page); z-index: 1; }}
table.side th small, td small {{ color: var(--soft); }}
table.side th.token {{ min-width: 5rem; max-width: 9rem; overflow-wrap: anywhere; }}
.text {{ font-family: ui-monospace, monospace; white-space: pre-wrap; background: var(--panel);
        border-radius: 2px; }}
.bar {{ display: flex; height: .6rem; margin: .2rem 0; background: var(--panel); }}
.bar i, .legend i {{ display: block; }}
.experts {{ background: {BLUE}; }} .mean-gate {{ background: {ORANGE}; }} .bias {{ background: {GREY}; }}
.skip {{ background: #8d6cab; }} .missing {{ background: var(--line); }}
.legend {{ display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none;
          font-size: .9rem; }}
.legend i {{ display: inline-block; width: .8rem; height: .8rem; vertical-align: -.05rem; }}
.line {{ display: grid; grid-auto-flow: column; grid-template-columns: minmax(3rem, 1fr);
        grid-auto-columns: 3.6rem;
        white-space: nowrap; }}
.line span {{ text-align: right; }} .line span:first-child {{ text-align: left; overflow: hidden; }}
.line .text, .tip .text {{ white-space: pre; }}
.best {{ font-weight: 600; }} .best small {{ font-weight: normal; }}
.tip {{ display: none; position: fixed; left: 0; right: 0; bottom: 0; z-index: 2; max-height: 45vh;
       overflow: auto; padding: .6rem max(1rem, 50vw - 49rem); background: var(--panel);
       border-top: 1px solid var(--soft); pointer-events: none; }}
td:hover > .tip, td:focus > .tip {{ display: flex; flex-wrap: wrap; gap: .3rem 2.5rem; }}
td:focus > .tip {{ pointer-events: auto; }}
main:has(td:hover) td:focus:not(:hover) > .tip {{ display: none; }}
.tip b {{ flex-basis: 100%; overflow-wrap: anywhere; }}
.side .tip table {{ width: auto; font-size: .84rem; }}
.side .tip td, .side .tip th {{ padding: .05rem .5rem; border: 0; min-width: 0; position: static;
                               background: none; text-align: right; }}
.side .tip td:first-child, .side .tip th:first-child {{ text-align: left; }}
th.number {{ text-align: right; }}
"""


def write_comparison_page(path: str | Path, comparison: Comparison) -> Path:
    """Writes the page.

    Args:
        path: the HTML file.
        comparison: what `compare` found.
    """
    mean_of = (
        "the prompt itself (which flatters it where the prompt is short)"
        if comparison.n_mean_tokens is None
        else f"{comparison.n_mean_tokens:,} tokens of a text"
    )
    legend = "".join(
        f'<li><i class="{_css_class(part)}"></i> {escape(part)}: {meaning}</li>'
        for part, meaning in zip(
            PARTS,
            (
                "what they write beyond the mean gate",
                f"what their mean over {mean_of} writes; the same at every token, but for an MxD&rsquo;s "
                "decoder branch",
                "the linear skip connection",
                "the same at every token",
                "what the layer does not write of the MLP&rsquo;s output",
            ),
            strict=True,
        )
    )
    return write_page(
        path,
        f"One prompt, {len(comparison.layers)} decompositions",
        f"{comparison.model_name}, {comparison.hook_name_out}. Hover over a cell, or reach it with the Tab "
        "key, for everything about it.",
        [
            "<main>",
            f'<p class="continuation">{_prompt(comparison)}</p>',
            "<h2>Over the prompt</h2>",
            f'<div class="wide"><table>{_summary(comparison)}</table></div>',
            "<p>Errors are means of ||ŷ &minus; y||&sup2; / ||y||&sup2;, CE is the cross-entropy of the "
            "prompt in nats; dense: with the dense part alone. One prompt is an example, not a measurement: "
            "mxd-lens evaluate judges a layer on held-out text.</p>",
            "<h2>What writes the MLP&rsquo;s output</h2>",
            "<p>The bar is the output taken apart: each part&rsquo;s length along it, as a share of it. "
            "Shares sum to 1; parts that point against the output are left out of the bar and stand in the "
            "details. Below it the error ||ŷ &minus; y||&sup2; / ||y||&sup2;, in brackets that of the dense "
            "part alone (mean gate, skip and bias), and the experts with the largest shares: id, "
            "coefficient, share of the output.</p>",
            f'<ul class="legend">{legend}</ul>',
            _side_by_side(
                comparison,
                [layer.name for layer in comparison.layers],
                [_experts_cell(comparison, layer) for layer in comparison.layers],
            ),
            "<h2>What the model expects next</h2>",
            "<p>Without the layer and with it in the MLP&rsquo;s place: the likeliest next tokens, the loss "
            "on the one that follows, in nats, and KL(unmodified || replaced).</p>",
            _side_by_side(
                comparison,
                ["unmodified", *(layer.name for layer in comparison.layers)],
                [
                    _predictions_cell(comparison, "unmodified", {"": comparison.unmodified}),
                    *(
                        _predictions_cell(
                            comparison,
                            layer.name,
                            {"with the layer": layer.replaced, "its dense part alone": layer.mean_gate},
                        )
                        for layer in comparison.layers
                    ),
                ],
            ),
            "</main>",
        ],
        STYLE,
    )


Cell = Callable[[int], tuple[str, str]]
"""What a cell shows of a position, and its details; both HTML."""


def _css_class(part: str) -> str:
    return part.replace(" ", "-")


def _text(text: str) -> str:
    """A token's text, marked off; what does not print as an escape."""
    return f'<bdi class="text">{escape(printable(text)) or "&middot;"}</bdi>'


def _prompt(comparison: Comparison) -> str:
    # Newlines are shown as such here, where the text stands as a whole.
    return "<br>".join(escape(printable(line)) for line in "".join(comparison.prompt).split("\n"))


def _summary(comparison: Comparison) -> str:
    first, *numbers = comparison.columns
    head = f"<th>{escape(first)}</th>" + "".join(f'<th class="number">{escape(c)}</th>' for c in numbers)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(printable(cell))}</td>"
            if isinstance(cell, str)
            else f'<td class="number">{shown(cell) if isinstance(cell, float) else f"{cell:,}"}</td>'
            for cell in row
        )
        + "</tr>"
        for row in comparison.rows
    )
    return f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"


def _side_by_side(comparison: Comparison, names: Sequence[str], cells: Sequence[Cell]) -> str:
    """A table with a row a token and a column a layer."""
    head = "".join(f"<th>{escape(printable(name))}</th>" for name in ("token", *names))
    rows = []
    for t, text in enumerate(comparison.prompt):
        columns = "".join(
            f'<td tabindex="0">{brief}<div class="tip">{details}</div></td>'
            for brief, details in (cell(t) for cell in cells)
        )
        norm = shown(comparison.output_norms[t].item())
        rows.append(
            f'<tr><th class="token">{_text(text)}<br><small>{t}, ||y|| {norm}</small></th>{columns}</tr>'
        )
    return (
        f'<div class="wide"><table class="side"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _lines(rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(
        '<div class="line">' + "".join(f"<span>{cell}</span>" for cell in row) + "</div>" for row in rows
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _experts_cell(comparison: Comparison, layer: Decomposition) -> Cell:
    def cell(t: int) -> tuple[str, str]:
        title = f"<b>{_text(comparison.prompt[t])} {t}, {escape(printable(layer.name))}</b>"
        if not layer.kept[t]:
            return "<small>left to the MLP</small>", f"{title}The layer was trained without special tokens."
        experts = [
            (f"#{n}", shown(a), percent(share), shown(norm))
            for n, a, share, norm in zip(
                *(
                    values[t].tolist()
                    for values in (layer.experts, layer.coefficients, layer.expert_shares, layer.norms)
                ),
                strict=True,
            )
            if a
        ]
        shares = dict(zip(PARTS, layer.shares[t].tolist(), strict=True))
        errors = [other.error[t].item() for other in comparison.layers if other.kept[t]]
        error, dense = layer.error[t].item(), shown(layer.error_mean_gate[t].item())
        best = ' class="best"' if len(errors) > 1 and error == min(errors) else ""
        brief = (
            _bar(shares)
            + f"<div{best}>error {shown(error)} <small>({dense})</small></div>"
            + _lines(row[:3] for row in experts[:IN_CELL])
        )
        details = (
            title
            + _table(
                ["part", "share of y"],
                ((escape(part), percent(share)) for part, share in shares.items() if share),
            )
            + _table(["expert", "coefficient", "share of y", "norm"], experts)
            + f"<div>{int(layer.n_active[t])} of {layer.n_experts:,} active<br>error {shown(error)}<br>"
            f"of the dense part alone {dense}</div>"
        )
        return brief, details

    return cell


def _bar(shares: dict[str, float]) -> str:
    positive = {part: share for part, share in shares.items() if share > 0 and math.isfinite(share)}
    whole = max(1.0, sum(positive.values()))
    return (
        '<div class="bar">'
        + "".join(
            f'<i class="{_css_class(part)}" style="width:{100 * share / whole:.1f}%"></i>'
            for part, share in positive.items()
        )
        + "</div>"
    )


def _predictions_cell(comparison: Comparison, name: str, kinds: dict[str, Predictions]) -> Cell:
    def likeliest(predictions: Predictions, t: int) -> Iterator[tuple[str, str]]:
        for token, p in zip(
            predictions.tokens[t].tolist(), predictions.probabilities[t].tolist(), strict=True
        ):
            yield _text(comparison.vocabulary[token]), percent(p)

    def numbers(predictions: Predictions, t: int) -> str:
        loss, divergence = predictions.loss[t].item(), predictions.divergence[t].item()
        known = "" if math.isnan(loss) else f"loss {shown(loss)}"
        return ", ".join(part for part in (known, f"KL {divergence:.2g}" if len(kinds) > 1 else "") if part)

    def cell(t: int) -> tuple[str, str]:
        first = next(iter(kinds.values()))
        brief = _lines(list(likeliest(first, t))[:IN_CELL]) + f"<small>{numbers(first, t)}</small>"
        details = f"<b>after {_text(comparison.prompt[t])} {t}, {escape(printable(name))}</b>" + "".join(
            f"<div>{_table([kind or 'next token', ''], likeliest(p, t))}{numbers(p, t)}</div>"
            for kind, p in kinds.items()
        )
        return brief, details

    return cell
