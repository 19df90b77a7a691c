"""Time and memory of one training step: `python -m benchmarks.train_step --help`.

Contestants run in turn in one process, so that a slow moment of the machine hits
all of them; medians and quartiles are reported. Peak memory is measured in a
process of its own for each, as what one forward and backward pass adds to the
weights and the batch.
"""

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.contestants import CONTESTANTS, Layer, Size, missing_package

SIZES = {
    "gpt2": Size(d=768, n_experts=21_490, d_hidden=3_072, k=32, batch=4_096),
    "pythia-1.4b": Size(d=2_048, n_experts=57_344, d_hidden=8_192, k=32, batch=4_096),
    "llama-3.2-3b": Size(d=3_072, n_experts=86_016, d_hidden=12_288, k=32, batch=4_096),
}

SWEEP_N = (2_048, 4_096, 8_192, 16_384, 32_768, 65_536)
SWEEP_K = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Setting:
    """Where a contestant runs."""

    device: str
    dtype: torch.dtype

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


@dataclass
class Timing:
    """Seconds over the rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        if len(seconds) < 2:
            return cls(seconds[0], seconds[0], seconds[0])
        lower, _, upper = quantiles(seconds, n=4, method="inclusive")
        return cls(median(seconds), lower, upper)


@dataclass
class Result:
    """What was measured for one contestant at one size."""

    name: str
    size: Size
    parameters: int
    forward_backward: Timing
    optimizer: Timing
    peak_bytes: int | None
    """What forward and backward add to weights and batch; None where it cannot be measured."""


@dataclass
class Report:
    """What one run of this module measured, and under what conditions."""

    machine: dict[str, str | int]
    rounds: int
    """Timed rounds of each contestant at each size."""
    results: list[Result]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads a report that `save` wrote."""
        report = json.loads(path.read_text(encoding="utf-8"))
        for result in report["results"]:
            result["size"] = Size(**result["size"])
            for timing in ("forward_backward", "optimizer"):
                result[timing] = Timing(**result[timing])
        report["results"] = [Result(**result) for result in report["results"]]
        return cls(**report)


class Contestant:
    """A layer, its optimiser and its batch."""

    def __init__(self, name: str, size: Size, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.layer: Layer = CONTESTANTS[name](size).to(setting.device, setting.dtype)
        self.inputs = self.layer.inputs(*_batch(size, setting))
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=1e-4)  # as SAELens' trainer's

    def forward_backward(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        self.setting.synchronize()
        start = time.perf_counter()
        self.layer(*self.inputs).backward()
        self.setting.synchronize()
        return time.perf_counter() - start

    def optimizer_step(self) -> float:
        start = time.perf_counter()
        self.optimizer.step()
        self.setting.synchronize()
        return time.perf_counter() - start


def _batch(size: Size, setting: Setting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, size.batch, size.d, generator=generator)
    return x.to(setting.device, setting.dtype), y.to(setting.device, setting.dtype)


def peak_bytes(name: str, size: Size, setting: Setting) -> int | None:
    """What forward and backward add to weights and batch, at their highest.

    Meant for a fresh process. On a CPU it is the resident set, which Linux alone
    tells with a peak that can be reset.
    """
    small = replace(size, n_experts=512, d_hidden=64, batch=16, k=min(size.k, 64))
    Contestant(name, small, setting).forward_backward()
    contestant = Contestant(name, size, setting)
    if setting.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        contestant.forward_backward()
        return torch.cuda.max_memory_allocated(setting.device) - before
    return added_resident_bytes(contestant.forward_backward)


def added_resident_bytes(run: Callable[[], object]) -> int | None:
    """What a function adds to the resident set of this process, at its highest; None where it is not told."""
    if platform.system() != "Linux":
        run()
        return None
    # What was freed and not given back would be used again without showing.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(
    names: Sequence[str],
    size: Size,
    setting: Setting,
    rounds: int,
    advance: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Every contestant at one size, in turn; `advance` is called rounds + 2 times for each."""
    peaks = {}
    for name in names:
        peaks[name] = _alone(name, size, setting)
        advance()
    contestants = {name: Contestant(name, size, setting) for name in names}
    passes: dict[str, list[float]] = {name: [] for name in names}
    updates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            passes[name].append(contestant.forward_backward())
            updates[name].append(contestant.optimizer_step())
            contestant.optimizer.zero_grad(set_to_none=True)
            advance()
    return [
        Result(
            name,
            size,
            sum(p.numel() for p in contestants[name].layer.parameters()),
            # The first round warms caches and allocates the optimiser's state.
            Timing.of(passes[name][1:]),
            Timing.of(updates[name][1:]),
            peaks[name],
        )
        for name in names
    ]


def _alone(name: str, size: Size, setting: Setting) -> int | None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(peak_bytes, name, size, setting).result()


def size_title(size: Size) -> str:
    return f"d {size.d}, N {size.n_experts:,}, H {size.d_hidden:,}, K {size.k}, batch {size.batch:,}"


def rows(results: list[Result]) -> list[dict[str, str]]:
    """A row a contestant, at one size, with its factors over the reference and the floor."""
    by_name = {result.name: result.forward_backward.median for result in results}
    reference, floor = by_name.get("reference MxD"), by_name.get("floor")
    return [
        {
            "": result.name,
            "params M": f"{result.parameters / 1e6:.1f}",
            "fwd + bwd s": f"{seconds.median:.3g}",
            "quartiles": f"{seconds.lower_quartile:.3g}-{seconds.upper_quartile:.3g}",
            "ref / this": f"{reference / seconds.median:.2f}" if reference else "",
            "this / floor": f"{seconds.median / floor:.2f}" if floor else "",
            "Adam s": f"{result.optimizer.median:.3g}",
            "peak MB": "" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:,.0f}",
        }
        for result in results
        for seconds in [result.forward_backward]
    ]


def table(results: list[Result]) -> Table:
    """`rows` for a terminal."""
    lines = rows(results)
    out = Table(
        title=size_title(results[0].size),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for column in lines[0]:
        # The width of its numbers: the heading alone breaks, and all of it fits 80 characters.
        width = max(len(word) for word in [*column.split(), *(line[column] for line in lines)])
        out.add_column(column, justify="right" if column else "left", width=width)
    for line in lines:
        out.add_row(*line.values())
    return out


def machine(setting: Setting) -> dict[str, str | int]:
    """What the numbers depend on and a reader cannot see from them."""
    cuda = setting.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(setting.device) if cuda else platform.machine(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--size", default="gpt2", choices=SIZES, help="whose layer")
    parser.add_argument("--batch", type=int, help="tokens per step, in place of the size's 4,096")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME")
    parser.add_argument("--sweep", action="store_true", help="grow N, then K, around the size")
    parser.add_argument("--json", type=Path, help="file for everything measured, written after each size")
    options = parser.parse_args()

    console = Console()
    setting = Setting(options.device, getattr(torch, options.dtype))
    size = SIZES[options.size]
    size = replace(size, batch=options.batch or size.batch)
    sizes = [size]
    names = options.only or list(CONTESTANTS)
    if options.sweep:
        sizes = [replace(size, n_experts=n) for n in SWEEP_N]
        sizes += [replace(size, k=k) for k in SWEEP_K]
        names = options.only or ["reference MxD", "MxD", "floor"]
    for name in list(names):
        if package := missing_package(name):
            console.print(f"{name}: left out, package {package} is not installed")
            names.remove(name)

    report = Report(machine(setting), options.rounds, [])
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps", total=len(sizes) * len(names) * (options.rounds + 2))
        for one in sizes:
            results = measure(names, one, setting, options.rounds, partial(progress.advance, task))
            console.print(table(results))
            report.results += results
            if options.json:
                report.save(options.json)  # so that an interrupted sweep leaves what it has


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
