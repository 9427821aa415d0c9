"""A training step against plain PyTorch and against the floor, in one run on one machine.

    python benchmarks/train_step.py
    torchrun --nproc-per-node 4 benchmarks/train_step.py --parallel "tensor: 2" "sequence: true"

Ours is the engine of every run, on the layout that is asked for. Two plain loops (a module of
nn.Linear and scaled dot product attention, fused AdamW, one process) train the same shape on the
same masked tokens: one with the logits of every position, as one would write it first, one with
those of the predicted positions only, the same arithmetic as ours. In bf16 all three keep fp32
masters, moments and accumulated gradients. Steps alternate, so that a noisy machine disturbs all
alike; ratios are medians over neighbouring steps. The floor is the step's FLOPs at the rate of a
large matrix product. On a GPU the default is the width of LLaDA 8B: two layers beside each plain
loop, then as many layers as fit alone, with 4 and with 16 micro-batches a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from llada.config import RunConfig, build_config
from llada.config.sections import ModelSection
from llada.engine.layout import join_world, sample_offsets
from llada.engine.megatron import DTYPES, MegatronEngine
from llada.errors import UserError
from llada.model.flops import Peak, StepFlops, measured_matmul, step_flops
from llada.noise import random_lengths, timesteps
from llada.objectives import Batch, MaskedDiffusion, Window, collate

PLAIN_LOOPS = {"every_position": True, "same_arithmetic": False}
"""Name of a plain loop, and whether it computes the logits of every position."""


class PlainModel(torch.nn.Module):
    """A bidirectional Llama as one would write it first."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        m = config.model
        self.m = m
        self.embedding = torch.nn.Embedding(m.vocab_size, m.hidden_size)
        self.layers = torch.nn.ModuleList(
            PlainLayer(m.hidden_size, m.num_attention_heads, m.ffn_hidden_size)
            for _ in range(m.num_layers)
        )
        self.norm = torch.nn.RMSNorm(m.hidden_size, m.norm_eps)
        self.head = torch.nn.Linear(m.hidden_size, m.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.trunc_normal_(parameter, std=m.hidden_size**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        m = self.m
        frequencies = 1.0 / m.rope_theta ** (
            torch.arange(0, m.head_dim, 2, device=tokens.device).float() / m.head_dim
        )
        angles = torch.outer(
            torch.arange(tokens.shape[1], device=tokens.device).float(), frequencies
        )
        cos, sin = angles.cos().to(self.head.weight.dtype), angles.sin().to(self.head.weight.dtype)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class PlainLayer(torch.nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.RMSNorm(width, 1e-5), torch.nn.RMSNorm(width, 1e-5)
        self.qkv, self.out = (
            torch.nn.Linear(width, 3 * width, bias=False),
            torch.nn.Linear(width, width, bias=False),
        )
        self.gate, self.up = (
            torch.nn.Linear(width, ffn, bias=False),
            torch.nn.Linear(width, ffn, bias=False),
        )
        self.down = torch.nn.Linear(ffn, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(self.turn(q, cos, sin), self.turn(k, cos, sin), v)
        x = x + self.out(a.transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class PlainLoop:
    """Forward, weighted cross-entropy, backward, clip, AdamW.

    Args:
        config: the shape; in bf16 the loop keeps fp32 masters, moments and accumulated gradients,
            as the engine does.
        device: where.
        every_position: logits of every position, as one would write it first; else of the predicted
            ones, the engine's arithmetic.
    """

    def __init__(self, config: RunConfig, device: torch.device, every_position: bool) -> None:
        self.device, self.every_position = device, every_position
        self.model = PlainModel(config).to(device, DTYPES[config.precision])
        self.parameters = list(self.model.parameters())
        self.masters = self.parameters
        if config.precision == "bf16":
            self.masters = [
                torch.nn.Parameter(parameter.detach().float()) for parameter in self.parameters
            ]
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self, batches: list[Batch]) -> float:
        masters_apart = self.masters is not self.parameters
        self.optimizer.zero_grad(set_to_none=not masters_apart)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.loss(batch) / batch.normaliser
            loss.backward()
            total += loss.detach()
            if masters_apart:
                self._accumulate()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        if masters_apart:
            torch._foreach_copy_(
                [parameter.detach() for parameter in self.parameters],
                [master.detach() for master in self.masters],
            )
        return total.item()

    def _accumulate(self) -> None:
        """Add the gradients of a micro-batch to those in fp32."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad.add_(parameter.grad)
            parameter.grad = None

    def loss(self, batch: Batch) -> torch.Tensor:
        place, targets, weights = (batch.rows, batch.columns), batch.targets, batch.weights
        if self.every_position:
            place, everywhere = (slice(None), slice(None)), torch.zeros(batch.inputs.shape)
            targets = batch.inputs.index_put((batch.rows, batch.columns), targets).flatten()
            weights = everywhere.index_put((batch.rows, batch.columns), weights).flatten()
        hidden = self.model(batch.inputs.to(self.device))[place].flatten(0, -2)
        losses = F.cross_entropy(
            self.model.head(hidden).float(), targets.to(self.device), reduction="none"
        )
        return (losses * weights.to(self.device)).sum()


def make_batches(config: RunConfig, step: int, whole_rows: bool) -> tuple[list[Batch], StepFlops]:
    """A step of random tokens with the real distribution of t, masks and random lengths."""
    rng = np.random.default_rng(step)
    count, length = config.batch.global_, config.data.sequence_length
    samples = step * count + np.arange(count)
    cuts = (
        np.full(count, length)
        if whole_rows
        else random_lengths(0, samples, length, config.data.random_length_probability)
    )
    bounds = [np.unique([0, cut, length]) for cut in cuts]
    firsts = np.concatenate([[0], np.cumsum([len(b) - 1 for b in bounds])])
    lengths = np.concatenate([np.diff(b) for b in bounds])
    t = timesteps(0, step, lengths, "stratified")
    mask = config.model.vocab_size - 1
    objective = MaskedDiffusion(0, mask)
    windows = [
        Window(
            int(samples[i]),
            rng.integers(0, mask, length),
            bounds[i],
            t[firsts[i] : firsts[i + 1]],
            int(firsts[i]),
        )
        for i in range(count)
    ]
    corrupted = [objective.corrupt(window) for window in windows]
    micro = config.batch.micro
    batches = [
        collate(windows[i : i + micro], corrupted[i : i + micro], float(count * length))
        for i in range(0, count, micro)
    ]
    return batches, step_flops(
        config.model, lengths.tolist(), sum(len(c.predicted) for c in corrupted), length
    )


def config_of(args: argparse.Namespace, vocabulary: int, layers: int, rows: int) -> RunConfig:
    micro = args.micro or max(1, rows // dist.get_world_size())
    return build_config(
        {
            "precision": args.precision,
            "run": {"dir": "unused"},
            "train": {"steps": 1},
            "batch": {"global": rows, "micro": micro},
            "data": {"sequence_length": args.sequence_length, "mixture": [{"path": "unused"}]},
            "model": {
                "num_layers": layers,
                "hidden_size": args.hidden_size,
                "num_attention_heads": args.heads,
                "ffn_hidden_size": args.ffn_hidden_size,
                "vocab_size": vocabulary,
            },
            "schedule": {"stages": [{"shape": "constant", "start": 1e-4}]},
            "parallel": yaml.safe_load("{" + ", ".join(args.parallel) + "}"),
        }
    )


def timed(call: Any, device: torch.device) -> float:
    """Seconds of a call on all ranks."""
    dist.barrier()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def measure(
    config: RunConfig, steps: int, plain: str | None, profile: str | None = None
) -> dict[str, Any]:
    """Median step time of the engine, its ratio to a plain loop (on the first rank, alternating)
    and to the floor.

    Args:
        config: the shape.
        steps: measured, after two to warm up.
        plain: which of PLAIN_LOOPS; None: the engine alone.
        profile: file for a table of one more step's kernels by time, from the first rank.
    """
    engine = MegatronEngine(config, initialise=random_weights)
    place, device = engine.parallel_rank, engine.device
    try:
        loop = PlainLoop(config, device, PLAIN_LOOPS[plain]) if plain and place.is_main else None
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for step in range(steps + 2):
            batches, flops = make_batches(config, step, whole_rows=plain is not None)
            offsets = sample_offsets(
                config.batch.global_, config.batch.micro, place.data_rank, place.data_size
            )
            own = [engine.prepare(batches[part[0] // config.batch.micro]) for part in offsets]
            took = {"ours": timed(lambda own=own: engine.train_step(own, 1e-4).loss, device)}
            if plain:
                took["plain"] = timed(
                    lambda all_=batches: loop.step(all_) if loop else None, device
                )
            if step >= 2:
                for name, value in took.items():
                    seconds[name].append(value)
        if profile:
            write_profile(Path(profile), lambda: engine.train_step(own, 1e-4).loss, place.is_main)
        peak = Peak(device, DTYPES[config.precision])
        floor = flops.actual / place.world_size / measured_matmul(device, DTYPES[config.precision])
        step_time, capacity = statistics.median(seconds["ours"]), peak.flops * place.world_size
        return {
            "vocabulary": config.model.vocab_size,
            "layers": config.model.num_layers,
            "micro_batches": len(own),
            "ranks": place.world_size,
            "tokens_per_second": round(config.tokens_per_step / step_time, 1),
            "tflops_per_rank": round(flops.actual / step_time / place.world_size / 1e12, 4),
            "mfu": round(flops.actual / step_time / capacity, 4),
            "mfu_full_length": round(flops.full_length / step_time / capacity, 4),
            "mfu_causal_style": round(flops.causal_style / step_time / capacity, 4),
            "peak": f"{peak.flops / 1e12:.3g} TFLOP/s a rank, {peak.source}",
            "memory_gb": round(engine.peak_memory_gb(), 2),
            "time_over_floor": round(step_time / floor, 3),
            **(
                {f"time_over_plain_{plain}": _ratio(seconds["ours"], seconds["plain"])}
                if plain
                else {}
            ),
        }
    finally:
        engine.close()


def random_weights(
    model: ModelSection, seed: int, parameters: dict[str, torch.nn.Parameter], rank: int, size: int
) -> None:
    """Drawn on the device: the keyed initialisation takes a minute of CPU time for 8B parameters,
    and values do not matter here.
    """
    for parameter in parameters.values():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=model.hidden_size**-0.5)


def write_profile(path: Path, step: Callable[[], object], main_rank: bool) -> None:
    """A table of a step's operators by the device's time."""
    with torch.profiler.profile() as profiler:
        step()
    if main_rank:
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        path.write_text(
            profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=80)
        )


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over pairs of neighbouring steps."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def free_gpu_memory() -> None:
    """Engines that were closed live on in reference cycles, and with them their memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def layers_that_fit(args: argparse.Namespace, vocabulary: int) -> int:
    """18 bytes a parameter (bf16 weight, fp32 gradient, master weight and two moments) and the
    activations of a micro-batch.
    """
    free, _ = torch.cuda.mem_get_info()
    d, tokens = args.hidden_size, args.micro * args.sequence_length
    fixed = 18 * 2 * vocabulary * d + 14 * tokens * vocabulary
    layer = 18 * (4 * d * d + 3 * d * args.ffn_hidden_size) + tokens * (
        34 * d + 10 * args.ffn_hidden_size
    )
    return max(1, int((0.9 * free - fixed) // layer))


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[126464] if gpu else [1024, 32000]
    )
    parser.add_argument(
        "--layers", type=int, default=0, help="0: 4 on CPU, as many as fit on a GPU"
    )
    parser.add_argument("--hidden-size", type=int, default=4096 if gpu else 256)
    parser.add_argument("--heads", type=int, default=32 if gpu else 4)
    parser.add_argument("--ffn-hidden-size", type=int, default=12288 if gpu else 768)
    parser.add_argument("--sequence-length", type=int, default=4096 if gpu else 256)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[4, 16] if gpu else [16], help="sequences per step"
    )
    parser.add_argument(
        "--micro",
        type=int,
        default=1 if gpu else 0,
        help="sequences per micro-batch; 0: the rows divided by the ranks",
    )
    parser.add_argument("--precision", default="bf16" if gpu else "fp32", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=8 if gpu else 20, help="measured steps")
    parser.add_argument(
        "--parallel",
        nargs="*",
        default=[],
        metavar="KEY: VALUE",
        help="settings of the parallel section, as 'tensor: 2'",
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="write a table of the kernels of one step, of the last shape measured",
    )
    args = parser.parse_args()
    join_world()
    main_rank = dist.get_rank() == 0

    def report(
        vocabulary: int, layers: int, rows: int, plain: str | None, profile: str | None = None
    ) -> None:
        free_gpu_memory()
        result = measure(config_of(args, vocabulary, layers, rows), args.steps, plain, profile)
        if main_rank:
            print(json.dumps(result), flush=True)

    if main_rank:
        device = torch.cuda.get_device_name() if gpu else "CPU"
        print(
            f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads a rank,"
            f" {args.precision}"
        )
    for vocabulary in args.vocabularies:
        for plain in PLAIN_LOOPS:
            report(vocabulary, args.layers or (2 if gpu else 4), args.rows[0], plain)
        if gpu and not args.layers:
            free_gpu_memory()
            layers = layers_that_fit(args, vocabulary)
            for rows in args.rows:
                report(vocabulary, layers, rows, None, args.profile)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
