"""What README.md and docs/ say was measured, read from results/ and written between marks.

    normalised MSE <!-- {layer12.normalized_mse:.3f} -->0.225<!-- -->

The first comment is a format string over the names below; what follows it up to the empty comment is its
value. `make numbers` writes the values, `python docs/measured.py --check` fails where one is not what its
file holds, or where a page has a decimal number that is neither marked nor code.
"""

import gzip
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
BUNDLED = ROOT / "mxd_lens" / "pretrained" / "weights"

MARK = re.compile(r"<!-- (\{[^}]+\}) -->(.*?)<!-- -->", re.DOTALL)
NOT_PROSE = re.compile(
    r"^```.*?^```$|^    .*?$|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->|\$\$.*?\$\$|\$[^$\n]+\$",
    re.DOTALL | re.MULTILINE,
)
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\w)|\d %|\d%")
VERSION = re.compile(r"(Python|arXiv|torch|transformers|SAELens|TransformerLens|sae-lens|MIT|version) $")


class Report(SimpleNamespace):
    """What `mxd_lens.evaluate` measured of one layer."""

    @property
    def added_loss(self) -> float:
        """What the replacement adds to the cross-entropy, nats per token."""
        return self.ce_loss_replaced - self.ce_loss

    @property
    def added_loss_mean_gate(self) -> float:
        return self.ce_loss_mean_gate - self.ce_loss

    @property
    def added_loss_zero_ablated(self) -> float:
        return self.ce_loss_zero_ablated - self.ce_loss


def read(path: Path) -> Any:
    """A JSON file, its objects as namespaces; reports of layers as `Report`."""

    def namespace(values: dict[str, Any]) -> SimpleNamespace:
        return (Report if "ce_loss_replaced" in values else SimpleNamespace)(**values)

    return json.loads(path.read_text(encoding="utf-8"), object_hook=namespace)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Frontier:
    """results/frontier-smollm2-135m: reports by architecture and K, of one layer on one text.

    Where several seeds were trained, a report is their mean.
    """

    titles = {  # noqa: RUF012
        "topk_transcoder": "transcoder",
        "mxd": "MxD",
        "skip_mxd": "SkipMxD",
        "topk_skip_transcoder": "skip transcoder",
        "topk_sae": "SAE of the output",
    }

    def __init__(self, layer: int, text: str) -> None:
        sweep = read(RESULTS / "frontier-smollm2-135m" / "frontier.json")
        self.settings = sweep.settings
        self.seeds: dict[str, dict[int, list[Report]]] = {}
        for point in sweep.points:
            if point.layer == layer and (report := getattr(point.reports, text, None)):
                self.seeds.setdefault(point.architecture, {}).setdefault(point.k, []).append(report)
        self.points = {
            name: {k: mean_of(reports) for k, reports in by_k.items()} for name, by_k in self.seeds.items()
        }

    def __getattr__(self, name: str) -> SimpleNamespace:
        """The reports of an architecture: `frontier.mxd.k32`."""
        return SimpleNamespace(**{f"k{k}": report for k, report in self.points[name].items()})

    @property
    def ratio(self) -> SimpleNamespace:
        """The MxD's error over the transcoder's: `frontier.ratio.k32`."""
        mxd, transcoder = self.points["mxd"], self.points["topk_transcoder"]
        ks = mxd.keys() & transcoder.keys()
        return SimpleNamespace(**{f"k{k}": mxd[k].normalized_mse / transcoder[k].normalized_mse for k in ks})

    def by_k(self, written: str) -> str:
        """A table of one quantity: a row for each K, a column for each architecture.

        Args:
            written: a format string over a report, as "{0.normalized_mse:.3f}".
        """
        found = {name: title for name, title in self.titles.items() if name in self.points}
        ks = sorted(set.union(*(set(self.points[name]) for name in found)))
        rows = (
            [str(k), *(written.format(r) if (r := self.points[name].get(k)) else "–" for name in found)]
            for k in ks
        )
        return table(["K", *found.values()], rows)

    @property
    def errors(self) -> str:
        return self.by_k("{0.normalized_mse:.3f}")

    @property
    def shares(self) -> str:
        return self.by_k("{0.feature_share:.2f}")

    @property
    def losses(self) -> str:
        return self.by_k("{0.added_loss:+.3f}")

    @property
    def spread(self) -> str:
        """A table of what was trained from several seeds: the mean, the least and the most."""
        quantities = ("normalized_mse", "feature_share", "added_loss")
        rows = []
        for name, title in self.titles.items():
            for k, reports in sorted(self.seeds.get(name, {}).items()):
                if len(reports) > 1:
                    values = [[getattr(report, quantity) for report in reports] for quantity in quantities]
                    cells = [f"{mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in values]
                    rows.append([title, str(k), str(len(reports)), *cells])
        return table(
            ["", "K", "seeds", "normalised MSE", "explained by experts", "cross-entropy added"], rows
        )


def at_scale(block: int, k: int, text: str, columns: dict[str, str]) -> str:
    """Layers at the paper's proportions: a row for each architecture, of one block, K and text.

    Args:
        block, k, text: which layers, and what they were evaluated on.
        columns: a format string over error, ablated and added (the cross-entropy) by the column's title.
    """
    found: dict[str, dict[int, Any]] = {}
    for row in AT_SCALE:
        plain = row.get("settings", {}) in ({}, {"d_hidden": 2304}) and not row.keys() & {
            "lr_factor",
            "batch",
        }
        if plain and (row.get("block"), row.get("k")) == (block, k):
            found.setdefault(row["architecture"], {})[row.get("seed", 0)] = row["texts"][text]
    unmodified = mean(AT_SCALE[0]["base"][text]["ce"])
    rows = []
    for name, title in ARCHITECTURES_AT_SCALE.items():
        error, ablated, ce = (
            mean(mean(seed[quantity]) for seed in found[name].values())
            for quantity in ("nmse", "mean_gate", "ce")
        )
        measured = {"error": error, "ablated": ablated, "added": ce - unmodified}
        rows.append([title, *(written.format(**measured) for written in columns.values())])
    return table(["", *columns], rows)


def mean_of(reports: list[Report]) -> Report:
    """The mean of every number in some reports; what is no number is the first one's."""
    first = vars(reports[0])
    numbers = (name for name, value in first.items() if isinstance(value, float))
    return Report(**first | {name: mean(getattr(report, name) for report in reports) for name in numbers})


def bundled(release: str, sae_id: str = "blocks.11.mlp") -> SimpleNamespace:
    """The two reports that lie beside a bundled layer's weights."""
    folder = BUNDLED / release / sae_id
    return SimpleNamespace(
        wikitext=read(folder / "report.json"),
        brown=read(folder / "report-2.json"),
        cfg=read(folder / "cfg.json"),
    )


def bundled_table(columns: dict[str, str]) -> str:
    """The bundled layers, on both texts.

    Args:
        columns: a format string over a report by the column's title.
    """
    rows = (
        [f"{name}, {text}", *(written.format(report) for written in columns.values())]
        for name, layer in (("MxD", mxd11), ("transcoder", transcoder11))
        for text, report in (("WikiText-2", layer.wikitext), ("Brown", layer.brown))
    )
    return table(["", *columns], rows)


def train_step_table() -> str:
    """A training step at GPT-2's size: this package beside others."""
    names = {
        "reference MxD": "MxD, dense products",
        "MxD": "**MxD**",
        "floor": "its gate (forward) and dense branch alone",
        "transcoder": "**TopK transcoder**, equal parameters",
        "eai-sparsify transcoder": "eai-sparsify's transcoder",
        "sae-lens TopK SAE": "SAELens' TopK SAE",
    }
    rows = [
        [title, f"{gpt2[name].forward_backward.median:.2f}", f"{gpt2[name].peak_bytes / 1e6:,.0f}"]
        for name, title in names.items()
    ]
    return table(["", "forward + backward, s", "peak above weights, MB"], rows)


def inference_table() -> str:
    """SmolLM2 with a layer in an MLP's place, tokens per second."""
    speeds = vars(read(RESULTS / "train-step" / "inference.json").tokens_per_second)
    return table(["", "tokens per second"], ([name, f"{speed.median:.0f}"] for name, speed in speeds.items()))


def ablation_table() -> str:
    """The MLPs of SmolLM2-135M that cost most when they are lost."""
    layers = sorted(ablation.layers, key=lambda layer: -layer.zero)[:7]
    rows = ([str(layer.layer), f"{layer.zero:.2f}", f"{layer.mean:.2f}"] for layer in layers)
    return table(["block", "zero ablated, nats", "mean ablated, nats"], rows)


def results_list() -> str:
    """The pages of results/, with their titles."""
    pages = sorted(RESULTS.glob("*/README.md"))
    titles = [page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ") for page in pages]
    return "\n".join(
        f"- [{title}](../results/{page.parent.name}/README.md)"
        for title, page in zip(titles, pages, strict=True)
    )


def compatibility_table() -> str:
    """The oldest and newest versions that the tests run with."""
    newest, oldest = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
        for name in ("constraints.txt", "constraints-lowest.txt")
    )
    needed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    rows = []
    for name, asked in re.findall(r'"([\w-]+)([^"]*)"', needed[1] if needed else ""):
        versions = [version_of(name, pinned) for pinned in (oldest, newest)]
        rows.append([f"`{name}`", f"`{asked}`", *versions])
    return table(["package", "asked for", "oldest tested", "newest tested"], rows)


def version_of(name: str, pinned: dict[str, str]) -> str:
    """The version of a package among pins, however its name is written there."""

    def plain(written: str) -> str:
        return written.lower().replace("_", "-")

    return {plain(other): version for other, version in pinned.items()}.get(plain(name), "not pinned")


with gzip.open(RESULTS / "frontier-at-scale" / "results.jsonl.gz", "rt", encoding="utf-8") as lines:
    AT_SCALE = [json.loads(line) for line in lines]
ARCHITECTURES_AT_SCALE = {
    "topk_transcoder": "transcoder",
    "mxd": "MxD",
    "topk_skip_transcoder": "skip transcoder",
    "affine_skip_mxd": "MxD with affine experts and a skip",
}
layer12 = read(RESULTS / "smollm2-135m-layer12" / "report.json")
mxd11, transcoder11 = bundled("smollm2-135m-mxd"), bundled("smollm2-135m-transcoder")
frontier = Frontier(layer=12, text="WikiText-2")
carry12 = vars(read(RESULTS / "carry-smollm2-135m" / "layer12.json"))
frontier2, brown2 = Frontier(layer=2, text="WikiText-2"), Frontier(layer=2, text="Brown")
gpt2 = {result.name: result for result in read(RESULTS / "train-step" / "gpt2.json").results}
ablation = read(RESULTS / "smollm2-135m-ablation" / "ablation.json")
ratio11 = mxd11.wikitext.normalized_mse / transcoder11.wikitext.normalized_mse
tables = SimpleNamespace(
    bundled_errors=bundled_table(
        {
            "normalised MSE": "{0.normalized_mse:.3f}",
            "under mean ablation": "{0.normalized_mse_mean_gate:.3f}",
            "under resample ablation": "{0.normalized_mse_shuffled_gate:.2f}",
            "explained by experts": "{0.feature_share:.2f}",
            "FVU": "{0.fraction_of_variance_unexplained:.3f}",
        }
    ),
    bundled_losses=bundled_table(
        {
            "unmodified": "{0.ce_loss:.3f}",
            "replaced": "{0.ce_loss_replaced:.3f}",
            "zero ablated": "{0.ce_loss_zero_ablated:.3f}",
            "recovered": "{0.ce_loss_recovered:.2f}",
        }
    ),
    headline=at_scale(
        12,
        32,
        "WikiText-2",
        {
            "error": "{error:.3f}",
            "error under mean ablation": "{ablated:.2f}",
            "cross-entropy added, nats": "{added:+.4f}",
        },
    ),
    errors12=frontier.errors,
    shares12=frontier.shares,
    losses12=frontier.losses,
    errors2=frontier2.errors,
    losses2=frontier2.losses,
    errors2_brown=brown2.errors,
    losses2_brown=brown2.losses,
    errors11=Frontier(layer=11, text="WikiText-2").errors,
    seeds=frontier.spread,
    train_step=train_step_table(),
    inference=inference_table(),
    ablation=ablation_table(),
    compatibility=compatibility_table(),
    results=results_list(),
)
NAMES = {
    "layer12": layer12,
    "mxd11": mxd11,
    "transcoder11": transcoder11,
    "ratio11": ratio11,
    "frontier": frontier,
    "frontier2": frontier2,
    "brown2": brown2,
    "carry12": carry12,
    "gpt2": gpt2,
    "ablation": ablation,
    "tables": tables,
}


def pages() -> list[Path]:
    """The pages whose numbers are read from results/: all but the one that the conformance tests write."""
    by_tests = ROOT / "docs" / "conformance.md"
    return [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page != by_tests)]


def updated(text: str) -> str:
    """The page with every marked number as its file has it."""

    def write(mark: re.Match[str]) -> str:
        value = mark[1].format(**NAMES)
        return f"<!-- {mark[1]} -->" + (f"\n\n{value}\n\n" if "\n" in value else value) + "<!-- -->"

    return MARK.sub(write, text)


def typed_numbers(text: str) -> list[str]:
    """Lines of prose with a decimal number or a percentage that no mark holds."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    prose = NOT_PROSE.sub(blank, MARK.sub(blank, text))
    return [
        line.strip()
        for line in prose.splitlines()
        if any(not VERSION.search(line[: found.start()]) for found in DECIMAL.finditer(line))
    ]


def problems() -> Iterator[str]:
    """What is wrong with the pages, a line each."""
    for page in pages():
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
        if not text.count("<!-- {") == text.count("<!-- -->") == len(MARK.findall(text)):
            yield f"{name}: a mark has no value or no end."
        for line in re.findall(r"^<!-- \{[^}]+\} -->.+$", text, re.MULTILINE):
            yield f"{name}: a line begins with a mark, which Markdown takes for a block of HTML: {line}"
        for mark in MARK.finditer(text):
            if (value := mark[1].format(**NAMES)) != mark[2].strip():
                yield f"{name}: {mark[1]} is {value}, the page says {mark[2].strip()}."
        yield from (
            f"{name}: a number that is not read from results/: {line}" for line in typed_numbers(text)
        )


def main() -> int:
    """Checks the pages, or writes their numbers."""
    if "--check" in sys.argv[1:]:
        found = list(problems())
        sys.stderr.writelines(f"{line}\n" for line in found)
        return 1 if found else 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := updated(text)) != text:
            page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
