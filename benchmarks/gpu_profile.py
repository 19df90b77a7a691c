"""Where the time of training goes on a GPU: one step of each architecture, the language model, a whole run.

    python -m benchmarks.gpu_profile [--device cuda] [--width 18432] [--batch 4096] [--k 32] [--json FILE]
        [--model FOLDER] [--parts step,graph,kernels,lm,runner]

step: one training step (forward, backward, Adam) at full float32, with TF32 products, and under bfloat16
autocast; the time until the host has issued it, and until the GPU is done. graph: the same step replayed as
a CUDA graph. kernels: the ten kernels that take longest. lm: tokens per second of the language model while it
captures MLP inputs and outputs. runner: MultiTranscoderTrainingRunner, language model and layers apart.
FOLDER: a Hugging Face folder with config.json and a tokenizer; its weights are random here.
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.saes.sae import TrainingSAE, TrainStepInput

from mxd_lens import TranscoderRunnerConfig
from mxd_lens.evals.frontier import CONTENDERS, Size
from mxd_lens.training.multi_runner import MultiTranscoderTrainingRunner

PRECISIONS = ("float32", "tf32", "bfloat16 autocast")


class Step:
    """A layer, its optimiser and a batch; called, it makes one training step."""

    def __init__(self, name: str, size: Size, k: int, batch: int, device: str, fused: bool = True) -> None:
        torch.manual_seed(0)
        self.layer = TrainingSAE.from_dict(CONTENDERS[name].config(size, k).to_dict()).to(device)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        self.optimizer = torch.optim.Adam(
            self.layer.parameters(), lr=1e-4, fused=fused and device != "cpu", capturable=device != "cpu"
        )
        self.pairs = torch.randn(batch, size.d_in + size.d_out, device=device)
        self.autocast = False

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.pairs.device.type, torch.bfloat16, enabled=self.autocast):
            step = self.layer.training_forward_pass(
                TrainStepInput(
                    sae_in=self.pairs,
                    coefficients={},
                    dead_neuron_mask=None,
                    n_training_steps=0,
                    is_logging_step=False,
                )
            )
        step.loss.backward()
        self.optimizer.step()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], device: str, repeats: int = 20) -> dict[str, float]:
    """Medians over single calls: issued by the host, and done; and the mean of calls back to back."""
    for _ in range(3):
        function()
    synchronize(device)
    issued, done = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        issued.append(time.perf_counter() - start)
        synchronize(device)
        done.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    back_to_back = (time.perf_counter() - start) / repeats
    return {
        "issued": 1e3 * statistics.median(issued),
        "done": 1e3 * statistics.median(done),
        "back_to_back": 1e3 * back_to_back,
    }


def set_precision(precision: str) -> bool:
    """TF32 or not; returns whether to autocast."""
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    return precision.startswith("bfloat16")


def steps(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in args.architectures:
        step = Step(name, size, args.k, args.batch, args.device)
        for precision in PRECISIONS:
            step.autocast = set_precision(precision)
            found[f"{name}, {precision}"] = milliseconds(step, args.device)
            print(name, precision, found[f"{name}, {precision}"], flush=True)
    return found


def graphs(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    found: dict[str, Any] = {}
    set_precision("tf32")
    for name in args.architectures:
        step = Step(name, size, args.k, args.batch, args.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        found[name] = milliseconds(graph.replay, args.device)
        print("graph", name, found[name], flush=True)
    return found


def kernels(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, Any] = {}
    set_precision("tf32")
    for name in args.architectures[:2]:
        step = Step(name, size, args.k, args.batch, args.device)
        for _ in range(3):
            step()
        synchronize(args.device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(5):
                step()
            synchronize(args.device)
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:16]
        found[name] = [[row.key[:90], row.count / 5, row.self_device_time_total / 5e3] for row in rows]
        for row in found[name]:
            print("kernel", name, row, flush=True)
    return found


def language_model(args: argparse.Namespace) -> Any:
    """The model with random weights, as a HookedSAETransformer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mxd_lens.models import load_model

    folder = Path(args.model).with_name("random-model")
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig.from_pretrained(args.model)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
    return load_model(folder, args.device)


def lm(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    found: dict[str, Any] = {}
    config = LlamaConfig.from_pretrained(args.model)
    n_blocks = config.num_hidden_layers
    hooked = language_model(args)
    plain = LlamaForCausalLM(config).to(args.device).eval()
    for sequences in args.sequences:
        tokens = torch.randint(3, 1000, (sequences, 128), device=args.device)
        names = {f"blocks.{b}.{point}" for b in range(n_blocks) for point in ("mlp.hook_in", "hook_mlp_out")}

        def with_cache(tokens: torch.Tensor = tokens, names: set[str] = names, stop: int = n_blocks) -> None:
            hooked.run_with_cache(tokens, names_filter=lambda name: name in names, stop_at_layer=stop)

        def without(tokens: torch.Tensor = tokens) -> None:
            plain.model(tokens, use_cache=False)

        for precision in ("float32", "tf32"):
            set_precision(precision)
            for label, function in (("HookedTransformer", with_cache), ("transformers", without)):
                with torch.no_grad():
                    measured = milliseconds(function, args.device, 3)
                rate = tokens.numel() / measured["back_to_back"] * 1e3
                found[f"{label}, {precision}, {sequences} sequences"] = measured | {"tokens_per_s": rate}
                print("lm", label, precision, sequences, measured, f"{rate:,.0f} tokens/s", flush=True)
    return found


def runner(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    set_precision("tf32")
    model = language_model(args)
    n_steps = args.runner_steps
    tokens = torch.randint(3, 1000, (n_steps * args.batch // 127 + 1024, 128))
    cfgs = {
        name: TranscoderRunnerConfig(
            sae=CONTENDERS[name].config(size, args.k),
            model_name="random-model",
            hook_name="blocks.12.mlp.hook_in",
            hook_name_out="blocks.12.hook_mlp_out",
            dataset_path="random tokens",
            training_tokens=n_steps * args.batch,
            train_batch_size_tokens=args.batch,
            n_batches_in_buffer=512,
            store_batch_size_prompts=256,
            lr=1e-3,
            lr_warm_up_steps=1,
            standardize_activations=True,
            n_checkpoints=0,
            save_final_checkpoint=False,
            output_path=None,
            exclude_special_tokens=[1],
            device=args.device,
            act_store_device=args.device,
            llm_device=args.device,
        )
        for name in args.architectures
    }
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    run = MultiTranscoderTrainingRunner(cfgs, override_dataset=dataset, override_model=model)
    spent = {"language model": 0.0, "batches": 0.0}
    capture, step = run.activations_store._capture, run.trainer._step

    def timed(function: Callable[..., Any], key: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            synchronize(args.device)
            start = time.perf_counter()
            result = function(*given)
            synchronize(args.device)
            spent[key] = spent.get(key, 0.0) + time.perf_counter() - start
            return result

        return call

    run.activations_store._capture = timed(capture, "language model")  # type: ignore[method-assign]
    run.trainer._step = timed(step, "layers")
    start = time.perf_counter()
    run.run()
    synchronize(args.device)
    total = time.perf_counter() - start
    found = {
        "seconds": total,
        "tokens": n_steps * args.batch,
        "layers": len(cfgs),
        "seconds_language_model": spent["language model"],
        "seconds_layers": spent["layers"],
        "seconds_rest": total - spent["language model"] - spent["layers"],
        "ms_per_step_and_layer": 1e3 * spent["layers"] / n_steps / len(cfgs),
    }
    print("runner", found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=18_432)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--batch", type=int, default=4_096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--architectures", default="mxd,topk_skip_transcoder,skip_mxd,topk_transcoder")
    parser.add_argument("--parts", default="step,graph,kernels,lm,runner")
    parser.add_argument("--sequences", default="64,512")
    parser.add_argument("--runner-steps", type=int, default=60)
    parser.add_argument("--model", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.architectures = args.architectures.split(",")
    args.sequences = [int(n) for n in args.sequences.split(",")]

    size = Size(args.d, args.d, 4 * args.d, args.width)
    parts: dict[str, Callable[[], Any]] = {
        "step": lambda: steps(args, size),
        "graph": lambda: graphs(args, size),
        "kernels": lambda: kernels(args, size),
        "lm": lambda: lm(args),
        "runner": lambda: runner(args, size),
    }
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "width": args.width,
        "batch": args.batch,
        "k": args.k,
    }
    for part in args.parts.split(","):
        start = time.perf_counter()
        try:
            report[part] = parts[part]()
        except Exception:
            report[part] = traceback.format_exc()
            print(part, report[part], flush=True)
        print(f"{part}: {time.perf_counter() - start:.1f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
