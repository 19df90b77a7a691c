"""Collects a dashboard of SmolLM2's bundled MxD and says what it cost: time, and memory above the model.

    python -m benchmarks.dashboard --output FOLDER [--experts 200] [--tokens 200000] [--text embedded]
                                   [--threads 2] [--also 17,42] [--no-loss-effects] [--json FILE]

The experts are drawn at random, or are all that fire (--experts live); --also names some in addition.
Several numbers of experts (--experts 20,40,80) are collected one after the other, each into a folder of its
own, which shows what one more expert costs. Seconds are of the clock and, in brackets, of the processor; what
an interrupted run had done is not in them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_step import Setting, added_resident_bytes, machine
from mxd_lens import MxD, load_model
from mxd_lens.cli.options import integers
from mxd_lens.dashboards.collect import collection
from mxd_lens.dashboards.collect.collection import collect_dashboard
from mxd_lens.dashboards.collect.data import CollectionConfig, DashboardData
from mxd_lens.dashboards.collect.excerpts import SecondPass
from mxd_lens.dashboards.collect.firings import FirstPass
from mxd_lens.models import SMOLLM2
from mxd_lens.text import load_text, token_sequences

RELEASE, SAE_ID = "smollm2-135m-mxd", "blocks.11.mlp"
CONTEXT = 128
STAGES: dict[str, tuple[Any, str]] = {
    "first pass": (FirstPass, "read"),
    "second pass": (SecondPass, "read"),
    "loss effects": (collection, "add_loss_effects"),
    "spectra": (collection, "add_spectra"),
}


@contextmanager
def timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Adds up the clock's and the processor's seconds that owner.name takes."""
    original: Callable[..., Any] = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[0] += time.perf_counter() - clock
            seconds[1] += time.process_time() - processor

    setattr(owner, name, run)
    try:
        yield
    finally:
        setattr(owner, name, original)


def cost(run: Callable[[], DashboardData]) -> dict[str, Any]:
    """Time and memory of one collection."""
    seconds = {stage: [0.0, 0.0] for stage in STAGES}
    clock, processor = time.perf_counter(), time.process_time()
    collected: list[DashboardData] = []
    with ExitStack() as stack:
        for stage, (owner, name) in STAGES.items():
            stack.enter_context(timed(owner, name, seconds[stage]))
        peak = added_resident_bytes(lambda: collected.append(run()))
    data = collected[0]
    bands = [band for expert in data.experts for band in expert.bands]
    return {
        "experts": len(data.experts),
        "alive": sum(expert.n_firings > 0 for expert in data.experts),
        "tokens": data.settings["n_tokens"],
        "excerpts": sum(len(band.excerpts) for band in bands),
        "seconds": time.perf_counter() - clock,
        "processor_seconds": time.process_time() - processor,
        "stages": seconds,
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--experts", default="200")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--text", default="embedded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--also", type=integers, default=[])
    parser.add_argument("--no-loss-effects", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = load_model(SMOLLM2)
    mxd = MxD.from_pretrained(RELEASE, SAE_ID)
    text = load_text(args.text, streaming=False).shuffle(seed=0)
    tokens = token_sequences(model, text, -(-args.tokens // (CONTEXT - 1)), CONTEXT)
    drawn = torch.randperm(mxd.cfg.d_sae, generator=torch.Generator().manual_seed(0))
    cfg = CollectionConfig(loss_effects=not args.no_loss_effects)
    results = []
    for n in args.experts.split(","):
        experts = n if n == "live" else torch.cat([drawn[: int(n)], torch.tensor(args.also).long()]).unique()
        run = cost(
            lambda experts=experts, n=n: collect_dashboard(  # type: ignore[misc]
                model,
                mxd,
                tokens,
                experts,
                args.output / f"{n}-experts",
                None if n == "live" else cfg,
                text_name=args.text,
                layer=f"{RELEASE}/{SAE_ID}",
            )
        )
        results.append(run)
        if args.json:
            about = machine(Setting("cpu", torch.float32)) | {"threads": args.threads}
            args.json.write_text(json.dumps({"machine": about, "runs": results}, indent=1) + "\n")
    rows = []
    for run in results:
        stages = [f"{clock:.0f} ({processor:.0f})" for clock, processor in run["stages"].values()]
        memory = None if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e6:,.0f}"
        whole = f"{run['seconds']:.0f} ({run['processor_seconds']:.0f})"
        rows.append([*(run[name] for name in ("experts", "tokens", "excerpts")), *stages, whole, memory])
    columns = ["experts", "tokens", "excerpts", *STAGES, "all, s", "MB above the model"]
    for row in rows:
        sys.stdout.write(
            "".join(f"{name}: {value}\n" for name, value in zip(columns, row, strict=True)) + "\n"
        )


if __name__ == "__main__":
    main()
