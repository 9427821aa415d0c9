"""`llada doctor`: what this machine has for training, and how to get what it lacks."""

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
from llada.errors import one_line

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
"""Modules with an attention kernel that llada can use."""
_MIN_SHARED_MEMORY = 1e9
"""Bytes. Containers have 64 MB unless told otherwise, and NCCL does not start with that."""
_MIN_FREE = 10e9
"""Bytes: a few checkpoints of a small model."""
_MIN_OPEN_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: heading of its section.
        text: what was found.
        level: "ok"; "note": training works, but not as well as it could; "problem": training does
            not start, or loses data.
        remedy: what to do; "" if nothing is wrong.
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
        """Exit code: 1 if something blocks training, else 0."""
        return int(any(finding.level == "problem" for finding in self.findings))

    def to_json(self) -> str:
        """One JSON object: `ready`, and every finding with topic, text, level and remedy."""
        return json.dumps(
            {"ready": not self.code, "findings": [asdict(finding) for finding in self.findings]},
            indent=1,
        )

    def __str__(self) -> str:
        marks = {"ok": "  ", "note": "- ", "problem": "! "}
        lines = []
        topic = ""
        for finding in self.findings:
            if finding.topic != topic:
                topic = finding.topic
                lines.append(topic)
            lines.append(f"  {marks[finding.level]}{finding.text}")
            if finding.remedy:
                lines.append(f"      {finding.remedy}")
        if self.code:
            lines.append("training is blocked: see the lines with !")
        else:
            lines.append("ready to train")
        return "\n".join(lines)


def examine(folder: Path | None = None) -> Report:
    """Examine packages, GPUs, kernels, network, disk and limits.

    Args:
        folder: the disk to try; None: that of the current folder.
    """
    folder = folder or Path.cwd()
    sections: tuple[Callable[[], Iterator[Finding]], ...] = (
        _packages,
        _gpus,
        _attention,
        _encoders,
        _network,
        lambda: _disk(folder),
        _limits,
    )
    findings: list[Finding] = []
    for section in sections:
        # A package can be installed and fail to import. One broken package must not hide the rest.
        try:
            findings += section()
        except ImportError as error:
            message = one_line(error)
            findings.append(Finding("broken package", message, "problem", "install it again"))
    return Report(findings)


def _packages() -> Iterator[Finding]:
    topic = "packages"
    yield Finding(
        topic, f"llada {__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    for name in _REQUIRED:
        installed = _version(name)
        if installed is None:
            yield Finding(topic, f"{name}: not installed", "problem", f"pip install {name}")
        else:
            yield Finding(topic, f"{name} {installed}")
    for name, remedy in _OPTIONAL.items():
        installed = _version(name)
        if installed is None:
            yield Finding(topic, f"{name}: not installed", "note", remedy)
        else:
            yield Finding(topic, f"{name} {installed}")


def _version(name: str) -> str | None:
    """Version of an installed package, None if it is not installed. Imports nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> Iterator[Finding]:
    topic = "GPUs"
    if _version("torch") is None:
        return
    import torch

    # The driver's own view, which may differ from torch's. One line a GPU: "driver, name".
    smi = _command("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
    listed = smi.splitlines()

    if torch.cuda.is_available():
        driver = "unknown"
        if listed:
            driver = listed[0].split(",")[0]
        yield Finding(topic, f"driver {driver}, CUDA {torch.version.cuda}")
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield Finding(
                topic,
                f"{i}: {properties.name}, {properties.total_memory / 1e9:.0f} GB, capability"
                f" {properties.major}.{properties.minor}",
            )
        if torch.distributed.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
            yield Finding(topic, f"NCCL {nccl}")
        else:
            yield Finding(topic, "NCCL: missing", "problem", "install torch from a CUDA build")
    elif listed:
        built = "built for CPU only"
        if torch.version.cuda:
            built = f"built for CUDA {torch.version.cuda}"
        yield Finding(
            topic,
            f"the driver lists {len(listed)} GPUs, torch ({built}) uses none",
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
    """What a program prints; "" if it is missing or fails."""
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

    installed = [module for module in _ATTENTION if _imports(module)]
    yield Finding(topic, f"installed: {', '.join(installed) or 'none but scaled dot product'}")
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
    """Whether a module can be imported."""
    try:
        import_module(module)
    except Exception:  # a library built for another version of torch fails in many ways
        return False
    return True


def _encoders() -> Iterator[Finding]:
    # The fast ones must also import: they are compiled, and a wheel may not suit the machine.
    encoders = [name for name in ("fastokens", "gigatoken") if _version(name) and _imports(name)]
    encoders += [name for name in ("tokenizers", "sentencepiece") if _version(name)]
    versions = ", ".join(f"{name} {_version(name)}" for name in encoders)
    yield Finding(
        "tokenizer encoders",
        f"{versions} (a fast one only where it gives the tokenizer's own ids)",
    )


def _network() -> Iterator[Finding]:
    topic = "network"
    interfaces = [name for _, name in socket.if_nameindex()]
    yield Finding(topic, f"host {socket.gethostname()}, interfaces {', '.join(interfaces)}")
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if variable in os.environ:
            yield _interface_choice(variable, os.environ[variable], interfaces)
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


def _interface_choice(variable: str, value: str, interfaces: list[str]) -> Finding:
    """Whether the interfaces that a variable selects exist.

    The value lists prefixes of names: "ib,eth0". "=" in front asks for exact names, "^" excludes.
    """
    topic = "network"
    text = f"{variable}={value}"
    prefixes = tuple(value.lstrip("^=").split(","))
    # What is excluded need not exist.
    if value.startswith("^") or any(name.startswith(prefixes) for name in interfaces):
        return Finding(topic, text)
    remedy = f"set it to one of {', '.join(interfaces)}, or unset it"
    return Finding(topic, text, "problem", remedy)


def _disk(folder: Path) -> Iterator[Finding]:
    topic = f"disk of {folder}"
    free = shutil.disk_usage(folder).free
    text = f"{_file_system(folder)}, {free / 1e9:,.1f} GB free"
    if free < _MIN_FREE:
        remedy = (
            "a checkpoint takes 14 to 16 bytes per parameter; `llada config CONFIG` prints how much"
            " a run needs"
        )
        yield Finding(topic, text, "note", remedy)
    else:
        yield Finding(topic, text)
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
    """Write, flush, lock and rename a file, as checkpoints and a run's lock do. Raises OSError."""
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
            raise OSError("a file reads back differently from what was written")


def _file_system(folder: Path) -> str:
    """Type of the file system that holds a folder, as ext4."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown file system"
    # Of all mount points above the folder the longest is the innermost; of two mounts in one place
    # the later one hides the earlier.
    path = str(folder.resolve())
    longest = ""
    file_system = "unknown file system"
    for line in lines:
        _, mount, mount_type, *_ = line.split(" ")
        is_above = path == mount or path.startswith(mount.rstrip("/") + "/")
        if is_above and len(mount) >= len(longest):
            longest = mount
            file_system = mount_type
    return file_system


def _limits() -> Iterator[Finding]:
    import resource

    topic = "limits"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"open files: {soft:,}"
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        remedy = f"ulimit -n {min(hard, 65536)}, for corpora of many shards"
        yield Finding(topic, text, "note", remedy)
    else:
        yield Finding(topic, text)

    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding(
            topic,
            "no shared memory (/dev/shm)",
            "note",
            "NCCL needs it between the GPUs of a node: mount a tmpfs there",
        )
        return
    size = shutil.disk_usage(shared).total
    text = f"shared memory: {size / 1e9:,.1f} GB"
    if size < _MIN_SHARED_MEMORY:
        remedy = "start the container with --shm-size=16g or --ipc=host"
        yield Finding(topic, text, "note", remedy)
    else:
        yield Finding(topic, text)
