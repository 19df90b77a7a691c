"""The page of one prompt through several decompositions of one MLP, side by side; it runs no script."""

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mxd_lens.artifacts.page import asset, render, style_sheet, write_html
from mxd_lens.artifacts.tables import percent, text_of
from mxd_lens.evals.comparison import PARTS, Comparison, Decomposition, Predictions

SHOWN = 3
"""Experts and next tokens that a cell shows; the others stand in its details."""

PACKAGE = "mxd_lens.reports"


def write_comparison_page(path: str | Path, comparison: Comparison) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        comparison: what `compare` found.
    """
    mean_of = (
        "the prompt itself (which flatters it where the prompt is short)"
        if comparison.n_mean_tokens is None
        else f"{comparison.n_mean_tokens:,} tokens of a text"
    )
    meanings = (
        "what they write beyond their mean",
        f"what their mean over {mean_of} writes",
        "the linear skip connection",
        "the same at every token",
        "what the layer does not write of the MLP's output",
    )
    page = render(
        PACKAGE,
        "comparison.html",
        {},
        title=f"One prompt, {len(comparison.layers)} decompositions",
        lead=f"{comparison.model_name}, {comparison.hook_name_out}. Point at a cell, or reach it with the "
        "Tab key, for all its numbers.",
        prompt="".join(comparison.prompt),
        summary=Markup("\n").join(table.html() for table in comparison.tables),
        legend=list(zip(PARTS, meanings, strict=True)),
        tokens=[
            {"text": text, "norm": norm}
            for text, norm in zip(comparison.prompt, comparison.output_norms.tolist(), strict=False)
        ],
        layers=[layer_column(comparison, layer) for layer in comparison.layers],
        predictors=[
            predictor(comparison, "unmodified", {"next token": comparison.unmodified}),
            *(
                predictor(
                    comparison,
                    layer.name,
                    {"with the layer": layer.replaced, "with its dense part alone": layer.mean_gate},
                )
                for layer in comparison.layers
            ),
        ],
        shown=SHOWN,
        css=style_sheet() + asset(PACKAGE, "comparison.css"),
    )
    return write_html(path, page)


def layer_column(comparison: Comparison, layer: Decomposition) -> dict[str, Any]:
    """What the page shows of one layer, a cell for each token."""
    return {
        "name": layer.name,
        "n_experts": f"{layer.n_experts:,}",
        "cells": [experts_cell(comparison, layer, t) for t in range(len(comparison.prompt))],
    }


def experts_cell(comparison: Comparison, layer: Decomposition, t: int) -> dict[str, Any]:
    """What one layer's experts do at one token."""
    columns = (layer.experts, layer.coefficients, layer.expert_shares, layer.norms)
    experts = [
        (f"#{n}", text_of(a), percent(share), text_of(norm))
        for n, a, share, norm in zip(*(values[t].tolist() for values in columns), strict=True)
        if a
    ]
    shares = dict(zip(PARTS, layer.shares[t].tolist(), strict=True))
    errors = [other.error[t].item() for other in comparison.layers if other.kept[t]]
    positive = {part: share for part, share in shares.items() if share > 0 and math.isfinite(share)}
    whole = max(1.0, sum(positive.values()))
    error = layer.error[t].item()
    return {
        "kept": bool(layer.kept[t]),
        "bar": [(part, f"{100 * share / whole:.1f}") for part, share in positive.items()],
        "error": error,
        "dense": layer.error_mean_gate[t].item(),
        "best": len(errors) > 1 and error == min(errors),
        "experts": [row[:3] for row in experts],
        "details": experts,
        "shares": [(part, percent(share)) for part, share in shares.items() if share],
        "n_active": int(layer.n_active[t]),
    }


def predictor(comparison: Comparison, name: str, kinds: dict[str, Predictions]) -> dict[str, Any]:
    """What the model predicts after each token, in each of several ways."""

    def cell(predictions: Predictions, t: int) -> dict[str, Any]:
        tokens = [comparison.vocabulary[token] for token in predictions.tokens[t].tolist()]
        loss = predictions.loss[t].item()
        return {
            "tokens": list(zip(tokens, predictions.probabilities[t].tolist(), strict=True)),
            "loss": None if math.isnan(loss) else loss,
            "divergence": predictions.divergence[t].item(),
        }

    return {
        "name": name,
        "kinds": [
            {"name": kind, "cells": [cell(predictions, t) for t in range(len(comparison.prompt))]}
            for kind, predictions in kinds.items()
        ],
    }
