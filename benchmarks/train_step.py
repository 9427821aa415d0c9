"""Compare a training step with plain PyTorch and with its lower limit, in one run on one machine.

    python benchmarks/train_step.py
    torchrun --nproc-per-node 4 benchmarks/train_step.py --parallel "tensor: 2" "sequence: true"

Ours is the engine of every run, in the given layout. Two plain loops (a module of nn.Linear and
scaled dot product attention, fused AdamW, one process) train the same shape on the same masked
tokens. One computes the logits of every position, as one would write it first; the other computes
those of the predicted positions only, the same arithmetic as ours. In bf16 all three keep fp32
masters, moments and accumulated gradients.

Each plain loop has a process of its own, whose steps alternate with ours, so that other work on the
machine affects both alike; ratios are medians over neighboring steps. Memory is the peak of the
engine's process so far, on a GPU of the shape. The lower limit ("floor") is the step's FLOPs at the
rate of a large matrix product. On a GPU the default is the width of LLaDA 8B: two layers next to
each plain loop, then as many layers as fit alone, with 4 and with 16 micro-batches per step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import yaml
from plain_process import PlainProcess
from step_batches import make_batches

from llada.config import RunConfig, build_config
from llada.config.sections import ModelSection
from llada.engine.layout import join_world, sample_offsets
from llada.engine.megatron import DTYPES, MegatronEngine
from llada.engine.rank_batch import RankBatch
from llada.errors import UserError
from llada.model.flops import Peak, StepFlops, measured_matmul

PLAIN_LOOPS = {"every_position": True, "same_arithmetic": False}
"""Name of a plain loop, and whether it computes the logits of every position."""
WARM_UP_STEPS = 2


class Defaults(NamedTuple):
    """Defaults of the options that have the same name."""

    vocabularies: list[int]
    hidden_size: int
    heads: int
    ffn_hidden_size: int
    sequence_length: int
    rows: list[int]
    micro: int
    precision: str
    steps: int


GPU_DEFAULTS = Defaults(
    vocabularies=[126464],
    hidden_size=4096,
    heads=32,
    ffn_hidden_size=12288,
    sequence_length=4096,
    rows=[4, 16],
    micro=1,
    precision="bf16",
    steps=8,
)
CPU_DEFAULTS = Defaults(
    vocabularies=[1024, 32000],
    hidden_size=256,
    heads=4,
    ffn_hidden_size=768,
    sequence_length=256,
    rows=[16],
    micro=0,
    precision="fp32",
    steps=20,
)


# -- what is trained -------------------------------------------------------------------------------


def run_config(args: argparse.Namespace, vocabulary: int, layers: int, rows: int) -> RunConfig:
    # By default each rank has one micro-batch.
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


def random_weights(
    model: ModelSection, seed: int, parameters: dict[str, torch.nn.Parameter], rank: int, size: int
) -> None:
    """Initialize on the device.

    The keyed initialization takes a minute of CPU time for 8B parameters, and values do not matter
    here.
    """
    for parameter in parameters.values():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=model.hidden_size**-0.5)


# -- measuring -------------------------------------------------------------------------------------


def measure(
    config: RunConfig, steps: int, plain: str | None, profile: str | None = None
) -> dict[str, object]:
    """Measure a step of the engine, and compare it with a plain loop and with the lower limit.

    Args:
        config: The run.
        steps: Number of measured steps, after two to warm up.
        plain: Key of PLAIN_LOOPS; None: the engine alone. The first rank starts the loop.
        profile: File for a table of the kernels of one more step, from the first rank.
    """
    engine = MegatronEngine(config, initialize=random_weights)
    try:
        return measure_engine(engine, steps, plain, profile)
    finally:
        engine.close()


def measure_engine(
    engine: MegatronEngine, steps: int, plain: str | None, profile: str | None
) -> dict[str, object]:
    """See `measure`."""
    config = engine.config
    own_rank = engine.parallel_rank
    loop = None
    if plain and own_rank.is_main:
        loop = PlainProcess(config, engine.device, PLAIN_LOOPS[plain])
    ours = []
    theirs = []
    for step in range(WARM_UP_STEPS + steps):
        batches, flops = make_batches(config, step, whole_rows=plain is not None)
        offsets = sample_offsets(
            config.batch.global_, config.batch.micro, own_rank.data_rank, own_rank.data_size
        )
        own = [engine.prepare(batches[part[0] // config.batch.micro]) for part in offsets]
        # The barriers keep all ranks idle during the plain loop's step.
        dist.barrier()
        their_time = 0.0
        if loop is not None:
            their_time = loop.step(step)
        our_time = timed(partial(engine_step, engine, own), engine.device)
        # The first steps allocate memory and choose kernels.
        if step >= WARM_UP_STEPS:
            ours.append(our_time)
            theirs.append(their_time)
    if profile:
        write_profile(Path(profile), partial(engine_step, engine, own), own_rank.is_main)
    result: dict[str, object] = {
        "vocabulary": config.model.vocab_size,
        "layers": config.model.num_layers,
        "micro_batches": len(own),
        "ranks": own_rank.world_size,
        **speed(engine, statistics.median(ours), flops),
    }
    if loop is not None:
        result[f"time_over_plain_{plain}"] = median_ratio(ours, theirs)
        result[f"memory_over_plain_{plain}"] = round(engine.peak_memory_gb() / loop.close(), 3)
    return result


def engine_step(engine: MegatronEngine, batches: list[RankBatch]) -> float:
    """A step of the engine; reading the loss waits until it is done."""
    return engine.train_step(batches, 1e-4).loss


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call on all ranks, of the slowest."""
    dist.barrier()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def speed(engine: MegatronEngine, step_time: float, flops: StepFlops) -> dict[str, object]:
    """Rates of a step that takes `step_time` seconds."""
    config = engine.config
    dtype = DTYPES[config.precision]
    num_ranks = engine.parallel_rank.world_size
    peak = Peak(engine.device, dtype)
    capacity = peak.flops * num_ranks
    floor = flops.actual / num_ranks / measured_matmul(engine.device, dtype)
    return {
        "tokens_per_second": round(config.tokens_per_step / step_time, 1),
        "tflops_per_rank": round(flops.actual / step_time / num_ranks / 1e12, 4),
        "mfu": round(flops.actual / step_time / capacity, 4),
        "mfu_full_length": round(flops.full_length / step_time / capacity, 4),
        "mfu_causal_style": round(flops.causal_style / step_time / capacity, 4),
        "peak": f"{peak.flops / 1e12:.3g} TFLOP/s a rank, {peak.source}",
        "memory_gb": round(engine.peak_memory_gb(), 2),
        "time_over_floor": round(step_time / floor, 3),
    }


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of neighboring steps."""
    ratios = [our_time / their_time for our_time, their_time in zip(ours, theirs, strict=True)]
    return round(statistics.median(ratios), 3)


def write_profile(path: Path, step: Callable[[], object], is_main: bool) -> None:
    """Write a table of a step's operators, those with the most time on the device first."""
    with torch.profiler.profile() as profiler:
        step()
    if is_main:
        sort_by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        averages = profiler.key_averages()
        path.write_text(averages.table(sort_by=sort_by, row_limit=40, max_name_column_width=80))


def free_gpu_memory() -> None:
    """Free the memory of engines that were closed: they live on in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def layers_that_fit(args: argparse.Namespace, vocabulary: int) -> int:
    """Estimate the number of layers that fit into the free memory of the GPU, with a margin."""
    free, _ = torch.cuda.mem_get_info()
    d = args.hidden_size
    ff = args.ffn_hidden_size
    tokens = args.micro * args.sequence_length
    # Bytes per parameter: 2 for the bf16 weight, 4 each for the fp32 gradient, the master weight
    # and the two moments.
    per_parameter = 18
    # Embedding and head, and the logits of a micro-batch.
    fixed = per_parameter * 2 * vocabulary * d + 14 * tokens * vocabulary
    # Weights and activations of a layer.
    per_layer = per_parameter * (4 * d * d + 3 * d * ff) + tokens * (34 * d + 10 * ff)
    return max(1, int((0.9 * free - fixed) // per_layer))


# -- the program -----------------------------------------------------------------------------------


def parse_arguments(gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The defaults are LLaDA 8B's sizes on a GPU, and toy sizes on a CPU.
    default = GPU_DEFAULTS if gpu else CPU_DEFAULTS
    parser.add_argument("--vocabularies", type=int, nargs="+", default=default.vocabularies)
    parser.add_argument(
        "--layers", type=int, default=0, help="0: 4 on CPU, as many as fit on a GPU"
    )
    parser.add_argument("--hidden-size", type=int, default=default.hidden_size)
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--ffn-hidden-size", type=int, default=default.ffn_hidden_size)
    parser.add_argument("--sequence-length", type=int, default=default.sequence_length)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=default.rows, help="sequences per step"
    )
    parser.add_argument(
        "--micro",
        type=int,
        default=default.micro,
        help="sequences per micro-batch; 0: the rows divided by the ranks",
    )
    parser.add_argument("--precision", default=default.precision, choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=default.steps, help="measured steps")
    parser.add_argument(
        "--parallel",
        nargs="*",
        default=[],
        metavar="KEY: VALUE",
        help="settings of the parallel section, such as 'tensor: 2'",
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="write a table of the kernels of one step of the last measured shape",
    )
    return parser.parse_args()


def main() -> None:
    gpu = torch.cuda.is_available()
    args = parse_arguments(gpu)
    join_world()
    is_main = dist.get_rank() == 0

    # One line of JSON per shape.
    def report(
        vocabulary: int, layers: int, rows: int, plain: str | None, profile: str | None = None
    ) -> None:
        free_gpu_memory()
        result = measure(run_config(args, vocabulary, layers, rows), args.steps, plain, profile)
        if is_main:
            print(json.dumps(result), flush=True)

    if is_main:
        device = torch.cuda.get_device_name() if gpu else "CPU"
        print(
            f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads a rank,"
            f" {args.precision}"
        )
    for vocabulary in args.vocabularies:
        for plain in PLAIN_LOOPS:
            profile = None if gpu else args.profile
            report(vocabulary, args.layers or (2 if gpu else 4), args.rows[0], plain, profile)
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
