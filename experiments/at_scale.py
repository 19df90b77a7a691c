"""The frontier at the paper's proportions, and a whole model of replaced MLPs, on one GPU.

    python -m experiments.at_scale --model FOLDER --texts texts.npz --jobs jobs.jsonl --output FOLDER
        [--device cuda] [--blocks 2,12]

FOLDER: SmolLM2-135M-Instruct as `mxd_lens.models.packaged_folder` makes it; for texts.npz see
`experiments.texts`.
jobs.jsonl holds a job a line, which are done in their order; the file is read again until a line says
{"job": "stop"}, so that jobs can be added. Results go to FOLDER/results.jsonl, a line for each job.

    {"job": "layer", "architecture": "affine_skip_mxd", "block": 12, "k": 32, "settings": {"d_hidden": 1152}}
    {"job": "stability", "layers": [name, ...]}                names of layers trained with "keep": true
    {"job": "whole", ...}                                      see `experiments.whole_model`
"""

import argparse
import json
import time
import traceback
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import variants, whole_model  # noqa: F401
from experiments.lean import Evaluation, LanguageModel, capture, found_again, new_layer, train, usage

WIDTH, TOKENS, BATCH = 18_432, 8_388_608, 4_096
TUNED_LR, TUNED_WIDTH = 4e-3, 4_608
"""The learning rate found at 8 x d_model; it falls with the square root of the width."""
HELD_OUT = ("WikiText-2", "Brown")
USAGE_TOKENS = 131_072


def learning_rate(width: int) -> float:
    return TUNED_LR * (TUNED_WIDTH / width) ** 0.5


class Bench:
    """The language model, its texts and activations, and the layers kept so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device: str = args.device
        if self.device != "cpu":
            torch.set_float32_matmul_precision("high")
        self.lm = LanguageModel(args.model, args.device)
        texts = np.load(args.texts)
        self.train_tokens = torch.from_numpy(texts["train"].astype(np.int64))[: args.sequences]
        self.held_out = {
            name: torch.from_numpy(texts[name].astype(np.int64))[: args.held_out] for name in HELD_OUT
        }
        start = time.perf_counter()
        blocks = args.blocks
        self.rows = capture(self.lm, self.train_tokens, blocks) if blocks else {}
        self.texts = {name: Evaluation(self.lm, tokens, blocks) for name, tokens in self.held_out.items()}
        self.kept: dict[str, Any] = {}
        """Of layers that were asked to be kept: how their experts are used."""
        self.whole_model: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        """The last whole model's layers by member and block, and the texts it is evaluated on."""
        self.setup = {
            "job": "setup",
            "train_tokens": len(self.train_tokens) * (self.train_tokens.shape[1] - 1),
            "held_out_tokens": {n: t.shape[0] * (t.shape[1] - 1) for n, t in self.held_out.items()},
            "seconds_activations": round(time.perf_counter() - start, 2),
            "device": torch.cuda.get_device_name() if self.device != "cpu" else "cpu",
            "torch": torch.__version__,
            "base": {name: self.base(text) for name, text in self.texts.items()},
        }

    def base(self, text: Evaluation) -> dict[str, Any]:
        """Cross-entropies of the unmodified model, and with one MLP's output at zero or at its mean."""
        found: dict[str, Any] = {"ce": text.loss.double().mean(1).tolist()}
        for block in self.args.blocks:
            mean = text.pairs[block][..., self.lm.d_model :].float().mean((0, 1))
            for name, value in (("zero", torch.zeros_like(mean)), ("mean", mean)):
                ce = text.predictions({block: whole_model.constant(value)})["ce"]
                found[f"ce_{name}_{block}"] = float(ce.double().mean())
        return found

    def layer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Trains one layer and evaluates it on both texts."""
        width, block = job.get("width", WIDTH), job["block"]
        layer = new_layer(
            job["architecture"],
            self.lm.d_model,
            width,
            job["k"],
            job.get("seed", 0),
            self.device,
            job.get("settings"),
            job.get("attributes"),
        )
        lr = job.get("lr_factor", 1.0) * learning_rate(width)
        layer, found = train(
            layer,
            self.rows[block],
            lr,
            job.get("tokens", TOKENS),
            job.get("batch", BATCH),
            job.get("order", 0),
        )
        start = time.perf_counter()
        found |= {
            "d_sae": layer.cfg.d_sae,
            "n_parameters": sum(p.numel() for p in layer.parameters()),
            "lr": lr,
            "texts": {
                name: text.layer(layer, block, job.get("with_model", True))
                for name, text in self.texts.items()
            },
        }
        found["seconds_evaluation"] = round(time.perf_counter() - start, 2)
        if "keep" in job:
            self.kept[job["keep"]] = usage(layer, self.rows[block][:USAGE_TOKENS, : self.lm.d_model].float())
        return found

    def stability(self, job: dict[str, Any]) -> dict[str, Any]:
        """How many experts of layers that differ in their seed are found again."""
        pairs = [found_again(self.kept[a], self.kept[b]) for a, b in combinations(job["layers"], 2)]
        return {"pairs": pairs}

    def whole(self, job: dict[str, Any]) -> dict[str, Any]:
        """Every MLP replaced."""
        return whole_model.run(self, job)

    def finetune(self, job: dict[str, Any]) -> dict[str, Any]:
        """The replaced model of the last "whole" fine-tuned."""
        start = time.perf_counter()
        found = whole_model.finetune(self, job)
        return found | {"seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=lambda s: [int(b) for b in s.split(",") if b], default=[2, 12])
    parser.add_argument("--sequences", type=int, help="of the training text; default: all")
    parser.add_argument("--held-out", type=int, help="sequences of each text; default: all")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    results = args.output / "results.jsonl"

    def write(job: dict[str, Any], found: dict[str, Any]) -> None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(job | found) + "\n")

    bench = Bench(args)
    write(bench.setup, {})
    print(bench.setup["seconds_activations"], "s for the activations", flush=True)
    done = 0
    while True:
        lines = args.jobs.read_text(encoding="utf-8").splitlines()
        if done == len(lines):
            time.sleep(0.1)
            continue
        job = json.loads(lines[done])
        done += 1
        if job["job"] == "stop":
            break
        if job["job"] == "mark":  # whoever adds jobs waits for it
            (args.output / job["name"]).touch()
            continue
        start = time.perf_counter()
        try:
            found = getattr(bench, job["job"])(job)
        except Exception as e:
            traceback.print_exc()
            found = {"failure": f"{type(e).__name__}: {e}"}
            if bench.device != "cpu":
                torch.cuda.empty_cache()
        write(job, found)
        print(summary(job, found), f"{time.perf_counter() - start:.1f} s", flush=True)


def summary(job: dict[str, Any], found: dict[str, Any]) -> str:
    """A job and what came out, in a line."""
    said = " ".join(f"{k}={v}" for k, v in job.items() if k not in ("job", "keep", "with_model"))
    if "texts" not in found:
        return f"{said[:200]} {found.get('failure', '')}{found.get('pairs', '')}{found.get('after', '')}"
    numbers = []
    for text in found["texts"].values():
        nmse, mean_gate = (sum(text[key]) / len(text[key]) for key in ("nmse", "mean_gate"))
        ce = sum(text["ce"]) / len(text["ce"]) if "ce" in text else float("nan")
        numbers.append(f"{nmse:.4f} share {1 - nmse / mean_gate:.3f} silent {text['silent']:.2f} ce {ce:.4f}")
    return f"{said} N={found['d_sae']} {found['seconds']}s | {' | '.join(numbers)}"


if __name__ == "__main__":
    main()
