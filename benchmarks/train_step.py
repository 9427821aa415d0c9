"""Our training step against a plain PyTorch loop, in one run on one machine.

    python benchmarks/train_step.py

Both train the same shape on the same masked tokens in one process: ours is the engine of every run (Megatron-Core, head and loss
on the predicted positions); the plain loop is what one would write first (a module of nn.Linear and scaled dot product attention,
logits of every position, AdamW). Steps alternate, so that a noisy machine disturbs both alike; the ratio is the median over pairs of steps.
On a GPU the default is the width of LLaDA 8B with as many layers as fit, and the plain loop runs at two layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llada.config import RunConfig, build_config
from llada.engine.megatron import DTYPES, MegatronEngine
from llada.model.flops import peak_flops, step_flops
from llada.noise import random_lengths, timesteps
from llada.objectives import Batch, MaskedDiffusion, Window, collate


class PlainModel(torch.nn.Module):
    """A bidirectional Llama as one would write it first."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        m = config.model
        self.m = m
        self.embedding = torch.nn.Embedding(m.vocab_size, m.hidden_size)
        self.layers = torch.nn.ModuleList(PlainLayer(m.hidden_size, m.num_attention_heads, m.ffn_hidden_size) for _ in range(m.num_layers))
        self.norm = torch.nn.RMSNorm(m.hidden_size, m.norm_eps)
        self.head = torch.nn.Linear(m.hidden_size, m.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.trunc_normal_(parameter, std=m.hidden_size**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        m = self.m
        frequencies = 1.0 / m.rope_theta ** (torch.arange(0, m.head_dim, 2, device=tokens.device).float() / m.head_dim)
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device).float(), frequencies)
        cos, sin = angles.cos().to(self.head.weight.dtype), angles.sin().to(self.head.weight.dtype)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


class PlainLayer(torch.nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.RMSNorm(width, 1e-5), torch.nn.RMSNorm(width, 1e-5)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width, bias=False), torch.nn.Linear(width, width, bias=False)
        self.gate, self.up = torch.nn.Linear(width, ffn, bias=False), torch.nn.Linear(width, ffn, bias=False)
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
    """Forward on all positions, weighted cross-entropy, backward, clip, AdamW."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.device = device
        self.model = PlainModel(config).to(device, DTYPES[config.precision])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self, batches: list[Batch]) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            clean, weights = batch.inputs.clone(), torch.zeros(batch.inputs.shape)
            clean[batch.rows, batch.columns] = batch.targets
            weights[batch.rows, batch.columns] = batch.weights
            inputs, clean, weights = (x.to(self.device) for x in (batch.inputs, clean, weights))
            logits = self.model(inputs)
            each = F.cross_entropy(logits.flatten(0, 1).float(), clean.flatten(), reduction="none")
            loss = (each * weights.flatten()).sum() / batch.normaliser
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total


def make_batches(config: RunConfig, step: int, whole_rows: bool) -> tuple[list[Batch], float, float]:
    """A step of random tokens with the real distribution of t, masks and random lengths; FLOPs (actual, full-length)."""
    rng = np.random.default_rng(step)
    count, length = config.batch.global_, config.data.sequence_length
    samples = step * count + np.arange(count)
    cuts = np.full(count, length) if whole_rows else random_lengths(0, samples, length, config.data.random_length_probability)
    bounds = [np.unique([0, cut, length]) for cut in cuts]
    firsts = np.concatenate([[0], np.cumsum([len(b) - 1 for b in bounds])])
    lengths = np.concatenate([np.diff(b) for b in bounds])
    t = timesteps(0, step, lengths, "stratified")
    mask = config.model.vocab_size - 1
    objective = MaskedDiffusion(0, mask)
    windows = [
        Window(int(samples[i]), rng.integers(0, mask, length), bounds[i], t[firsts[i] : firsts[i + 1]], int(firsts[i]))
        for i in range(count)
    ]
    corrupted = [objective.corrupt(window) for window in windows]
    micro = config.batch.micro
    batches = [collate(windows[i : i + micro], corrupted[i : i + micro], float(count * length)) for i in range(0, count, micro)]
    flops = step_flops(config.model, lengths.tolist(), sum(len(c.predicted) for c in corrupted), length)
    return batches, flops.actual, flops.full_length


def config_of(args: argparse.Namespace, vocabulary: int, layers: int) -> RunConfig:
    return build_config(
        {
            "precision": args.precision,
            "run": {"dir": "unused"},
            "train": {"steps": 1},
            "batch": {"global": args.rows, "micro": args.micro},
            "data": {"sequence_length": args.sequence_length, "mixture": [{"path": "unused"}]},
            "model": {
                "num_layers": layers,
                "hidden_size": args.hidden_size,
                "num_attention_heads": args.heads,
                "ffn_hidden_size": args.ffn_hidden_size,
                "vocab_size": vocabulary,
            },
            "schedule": {"stages": [{"shape": "constant", "start": 1e-4}]},
        }
    )


def timed(call: Any, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(config: RunConfig, steps: int, plain: bool) -> dict[str, Any]:
    """Median step times of the engine and, if asked, of the plain loop, alternating."""
    engine = MegatronEngine(config)
    device = engine.device
    try:
        loop = PlainLoop(config, device) if plain else None
        ours, theirs, flops = [], [], (0.0, 0.0)
        for step in range(steps + 2):
            batches, *counts = make_batches(config, step, whole_rows=plain)
            a = timed(lambda b=batches: engine.train_step(b, 1e-4), device)
            c = timed(lambda b=batches: loop.step(b), device) if loop else 0.0
            if step >= 2:  # two steps to warm up
                ours.append(a)
                theirs.append(c)
                flops = tuple(counts)
        peak, source = peak_flops(device, DTYPES[config.precision])
        seconds = statistics.median(ours)
        result = {
            "vocabulary": config.model.vocab_size,
            "layers": config.model.num_layers,
            "tokens_per_second": round(config.tokens_per_step / seconds, 1),
            "tflops": round(flops[0] / seconds / 1e12, 4),
            "mfu": round(flops[0] / seconds / peak, 4),
            "mfu_full_length": round(flops[1] / seconds / peak, 4),
            "peak": f"{peak / 1e12:.3g} TFLOP/s, {source}",
            "memory_gb": round(engine.peak_memory_gb(), 2),
        }
        if loop:
            result["plain_tokens_per_second"] = round(config.tokens_per_step / statistics.median(theirs), 1)
            result["ratio"] = round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3)
        return result
    finally:
        engine.close()


def layers_that_fit(args: argparse.Namespace, vocabulary: int) -> int:
    """18 bytes a parameter (bf16 weight, fp32 gradient, master weight and two moments) and the activations of a micro-batch."""
    free, _ = torch.cuda.mem_get_info()
    d, tokens = args.hidden_size, args.micro * args.sequence_length
    fixed = 18 * 2 * vocabulary * d + 14 * tokens * vocabulary
    layer = 18 * (4 * d * d + 3 * d * args.ffn_hidden_size) + tokens * (34 * d + 10 * args.ffn_hidden_size)
    return max(1, int((0.9 * free - fixed) // layer))


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[126464] if gpu else [1024, 32000])
    parser.add_argument("--layers", type=int, default=0, help="0: 4 on CPU, as many as fit on a GPU")
    parser.add_argument("--hidden-size", type=int, default=4096 if gpu else 256)
    parser.add_argument("--heads", type=int, default=32 if gpu else 4)
    parser.add_argument("--ffn-hidden-size", type=int, default=12288 if gpu else 768)
    parser.add_argument("--sequence-length", type=int, default=4096 if gpu else 256)
    parser.add_argument("--rows", type=int, default=4 if gpu else 16, help="sequences per step")
    parser.add_argument("--micro", type=int, default=1 if gpu else 16, help="sequences per micro-batch")
    parser.add_argument("--precision", default="bf16" if gpu else "fp32", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=8 if gpu else 20, help="measured steps")
    args = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.precision}"
    )
    for vocabulary in args.vocabularies:
        layers = args.layers or (2 if gpu else 4)
        print(json.dumps(compare(config_of(args, vocabulary, layers), args.steps, plain=True)), flush=True)
        if gpu and not args.layers:
            torch.cuda.empty_cache()
            print(json.dumps(compare(config_of(args, vocabulary, layers_that_fit(args, vocabulary)), args.steps, plain=False)), flush=True)


if __name__ == "__main__":
    main()
