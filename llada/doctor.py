"""`llada doctor`: what this machine has for training, and what to do about what it lacks."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from llada import __version__

Level = Literal["ok", "note", "problem"]
_REQUIRED = (
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "datasets",
    "pydantic",
    "omegaconf",
)
_OPTIONAL = {
    "flash-attn": "faster attention on a GPU: make flash-attn, in a clone (docs/first-gpu-run.md)",
    "fastokens": 'faster tokenizing: pip install "llada[fast]"',
    "gigatoken": 'faster tokenizing: pip install "llada[fast]"',
    "tensorboard": "logging.tensorboard needs it: pip install tensorboard",
    "wandb": "logging.wandb needs it: pip install wandb",
    "matplotlib": "the loss curve needs it: pip install matplotlib",
}
_ATTENTION = ("flash_attn.cute", "flash_attn_interface", "flash_attn", "torch.nn.attention.varlen")
_MIN_SHARED_MEMORY = 1e9
_MIN_FREE = 10e9
_MIN_OPEN_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: heading it belongs to.
        text: what there is.
        level: "ok"; "note": training works, though less well; "problem": training does not start or
            loses data.
        remedy: what to do; "" where nothing is wrong.
    """

    topic: str
    text: str
    level: Level = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Exit code: 1 where something blocks training."""
        return int(any(finding.level == "problem" for finding in self.findings))

    def to_json(self) -> str:
        """One object: `ready`, and every finding with topic, text, level and remedy."""
        return json.dumps(
            {"ready": not self.code, "findings": [asdict(finding) for finding in self.findings]},
            indent=1,
        )

    def __str__(self) -> str:
        lines, topic = [], ""
        for finding in self.findings:
            if finding.topic != topic:
                topic = finding.topic
                lines.append(topic)
            mark = {"ok": "  ", "note": "- ", "problem": "! "}[finding.level]
            lines.append(f"  {mark}{finding.text}")
            lines += [f"      {finding.remedy}"] if finding.remedy else []
        lines.append("training is blocked: see the lines with !" if self.code else "ready to train")
        return "\n".join(lines)


def examine(folder: Path | None = None) -> Report:
    """Look at packages, GPUs, kernels, network, disk and limits.

    Args:
        folder: whose disk is tried; the current one if left out.
    """
    folder = folder or Path.cwd()
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (
        _packages,
        _gpus,
        _attention,
        _encoders,
        _network,
        lambda: _disk(folder),
        _limits,
    )
    findings: list[Finding] = []
    for part in parts:
        try:
            findings += part()
        except ImportError as error:  # one broken package must not hide what the others say
            findings.append(
                Finding(
                    "broken package", " ".join(str(error).split()), "problem", "install it again"
                )
            )
    return Report(findings)


def _packages() -> Iterator[Finding]:
    topic = "packages"
    yield Finding(
        topic, f"llada {__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    for name in _REQUIRED:
        found = _version(name)
        if found is None:
            yield Finding(topic, f"{name}: not installed", "problem", f"pip install {name}")
        else:
            yield Finding(topic, f"{name} {found}")
    for name, remedy in _OPTIONAL.items():
        found = _version(name)
        yield (
            Finding(topic, f"{name}: not installed", "note", remedy)
            if found is None
            else Finding(topic, f"{name} {found}")
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> Iterator[Finding]:
    topic = "GPUs"
    smi = _command("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    if _version("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        driver = smi.splitlines()[0].split(",")[0] if smi else "unknown"
        yield Finding(topic, f"driver {driver}, CUDA {torch.version.cuda}")
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield Finding(
                topic,
                f"{i}: {properties.name}, {properties.total_memory / 1e9:.0f} GB, capability"
                f" {properties.major}.{properties.minor}",
            )
        nccl = (
            ".".join(map(str, torch.cuda.nccl.version()))
            if torch.distributed.is_nccl_available()
            else None
        )
        remedy = "" if nccl else "install torch from a CUDA build"
        yield Finding(
            topic, f"NCCL {nccl}" if nccl else "NCCL: missing", "ok" if nccl else "problem", remedy
        )
    elif smi:
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU alone"
        )
        yield Finding(
            topic,
            f"the driver lists {len(smi.splitlines())} GPUs, torch ({built}) uses none",
            "problem",
            "install a torch for the driver's CUDA version; check CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(
            topic,
            f"none; training runs on {len(os.sched_getaffinity(0))} CPU cores, which suits the demo"
            " and tests",
        )


def _command(*words: str) -> str:
    """What a program prints; "" where it is missing or fails."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _attention() -> Iterator[Finding]:
    topic = "attention kernels"
    if _version("torch") is None:
        return
    import torch

    found = [module for module in _ATTENTION if _imports(module)]
    yield Finding(topic, f"installed: {', '.join(found) or 'none but scaled dot product'}")
    if not torch.cuda.is_available():
        yield Finding(topic, "used here: torch scaled dot product (CPU)")
        return
    from llada.model.attention import kernel_name, varlen_kernel

    if varlen_kernel(torch.cuda.get_device_capability()[0]) is None:
        yield Finding(
            topic,
            "none for bf16 on this GPU",
            "problem",
            "make flash-attn, in a clone (docs/first-gpu-run.md)",
        )
    else:
        yield Finding(topic, f"used here for bf16: {kernel_name()}")


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except Exception:  # a library built for another torch fails in many ways
        return False
    return True


def _encoders() -> Iterator[Finding]:
    fast = [
        f"{name} {found}"
        for name in ("fastokens", "gigatoken")
        if (found := _version(name)) and _imports(name)
    ]
    library = [
        f"{name} {found}" for name in ("tokenizers", "sentencepiece") if (found := _version(name))
    ]
    yield Finding(
        "tokenizer encoders",
        f"{', '.join(fast + library)} (a fast one only where it gives the tokenizer's own ids)",
    )


def _network() -> Iterator[Finding]:
    topic = "network"
    names = [name for _, name in socket.if_nameindex()]
    chosen = {
        name: os.environ[name]
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        if name in os.environ
    }
    yield Finding(topic, f"host {socket.gethostname()}, interfaces {', '.join(names)}")
    for variable, value in chosen.items():
        wanted = value.lstrip("^=").split(",")
        known = value.startswith("^") or any(
            name.startswith(part) for name in names for part in wanted
        )
        remedy = "" if known else f"set it to one of {', '.join(names)}, or unset it"
        yield Finding(topic, f"{variable}={value}", "ok" if known else "problem", remedy)
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    yield Finding(topic, f"InfiniBand adapters: {', '.join(adapters) or 'none'}")
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        yield Finding(
            topic,
            "the host's own name has no address",
            "note",
            "add it to /etc/hosts, or set MASTER_ADDR for torchrun",
        )


def _disk(folder: Path) -> Iterator[Finding]:
    topic = f"disk of {folder}"
    free = shutil.disk_usage(folder).free
    yield Finding(
        topic,
        f"{_file_system(folder)}, {free / 1e9:,.1f} GB free",
        "note" if free < _MIN_FREE else "ok",
        (
            "a checkpoint takes 12 to 14 bytes a parameter; `llada config CONFIG` says how much a"
            " run needs"
            if free < _MIN_FREE
            else ""
        ),
    )
    try:
        _try_disk(folder)
    except OSError as error:
        yield Finding(
            topic,
            f"cannot be used: {error.strerror or error}",
            "problem",
            "choose a folder for runs that can be written",
        )
    else:
        yield Finding(topic, "write, fsync, rename and lock work")


def _try_disk(folder: Path) -> None:
    """Do what a checkpoint and a run's lock do. Raises OSError."""
    import fcntl

    with tempfile.TemporaryDirectory(prefix=".llada-doctor-", dir=folder) as name:
        root = Path(name)
        with open(root / "a", "wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.replace(root / "a", root / "b")
        descriptor = os.open(root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if (root / "b").read_bytes() != b"x" * 4096:
            raise OSError("what was written reads otherwise")


def _file_system(folder: Path) -> str:
    """Kind of the file system, by the longest mount point above the folder."""
    best = ("", "unknown file system")
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return best[1]
    path = str(folder.resolve())
    for line in lines:
        _, mount, kind, *_ = line.split(" ")
        if (path == mount or path.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(
            best[0]
        ):
            best = (mount, kind)
    return best[1]


def _limits() -> Iterator[Finding]:
    import resource

    topic = "limits"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES
    yield Finding(
        topic,
        f"open files: {soft:,}",
        "note" if few else "ok",
        f"ulimit -n {min(hard, 65536)}, for corpora of many shards" if few else "",
    )
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding(
            topic,
            "no shared memory (/dev/shm)",
            "note",
            "NCCL needs it between GPUs of a node: mount a tmpfs there",
        )
        return
    size = shutil.disk_usage(shared).total
    small = size < _MIN_SHARED_MEMORY
    remedy = "start the container with --shm-size=16g or --ipc=host" if small else ""
    yield Finding(topic, f"shared memory: {size / 1e9:,.1f} GB", "note" if small else "ok", remedy)
