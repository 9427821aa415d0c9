"""The install on a GPU machine: what `make setup` asks of pip, its pins, the container recipes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "containers" / "Dockerfile"
APPTAINER = ROOT / "containers" / "llada.def"
PYTHON = """#!/usr/bin/env bash
# Stands for python3: notes what it is called with, and makes a virtual environment of itself.
echo "$*" >>"$CALLS"
[ "$1 $2" != "-m venv" ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }
"""
FOR_MAKE = {"WHEELS", "TORCH_BUILD", "FLASH_ATTN_CUDA_ARCHS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
NVIDIA_SMI = """#!/usr/bin/env bash
case "$*" in
  -L) echo "GPU 0: NVIDIA H100" ;;
  *compute_cap*) echo 9.0 ;;
esac
"""


def pins(name: str) -> dict[str, Version]:
    lines = [
        line
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    requirements = [Requirement(line) for line in lines]
    assert all(
        len(r.specifier) == 1 and next(iter(r.specifier)).operator == "==" for r in requirements
    ), f"{name} pins exactly"
    return {r.name: Version(next(iter(r.specifier)).version) for r in requirements}


CPU, GPU = pins("constraints.txt"), pins("constraints-gpu.txt")


# --- make setup


class Machine:
    """A folder with Makefile and constraints, and stand-ins for python3, nvidia-smi and nvcc."""

    def __init__(self, folder: Path, gpu: bool) -> None:
        self.folder, self.calls = folder, folder / "calls"
        programs = folder / "programs"
        programs.mkdir()
        contents = {
            "python3": PYTHON,
            "nvidia-smi": NVIDIA_SMI if gpu else "#!/bin/sh\nexit 9\n",
            "nvcc": "#!/bin/sh\necho release 13.0,\n",
        }
        for name, content in contents.items():
            (programs / name).write_text(content, encoding="utf-8")
            (programs / name).chmod(0o755)
        for name in ("Makefile", "constraints.txt", "constraints-gpu.txt", "pyproject.toml"):
            (folder / name).write_bytes((ROOT / name).read_bytes())
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in FOR_MAKE},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CUDA_HOME": str(folder),
            "CALLS": str(self.calls),
        }

    def make(self, *words: str) -> tuple[int, str, list[str]]:
        """Exit code, stderr, and the new calls of pip."""
        self.calls.write_text("", encoding="utf-8")
        command = ["make", "PYTHON=python3", *words]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        calls = self.calls.read_text(encoding="utf-8").splitlines()
        return (
            done.returncode,
            done.stderr,
            [call.partition("--no-input ")[2] for call in calls if "-m pip" in call],
        )


CONSTRAINTS = "--constraint constraints.txt --constraint constraints-gpu.txt"


def test_setup_takes_the_build_of_torch_that_the_machine_needs(tmp_path: Path):
    for name, gpu, words, torch in (
        ("laptop", False, (), f"torch=={CPU['torch']}+cpu"),
        ("gpu", True, (), f"torch==={CPU['torch']}"),
        ("login", False, ("TORCH_BUILD=cuda",), f"torch==={CPU['torch']}"),
    ):
        (tmp_path / name).mkdir()
        machine = Machine(tmp_path / name, gpu)
        code, stderr, calls = machine.make("setup", *words)
        assert code == 0, stderr
        assert calls == [
            f"install {CONSTRAINTS} --no-deps {torch}",
            f"install {CONSTRAINTS} --editable .[dev]",
        ]
        assert machine.make("setup", *words) == (0, "", []), (
            "the second time there is nothing to do"
        )

    # What is installed on a login node for the GPU nodes stays; a CPU build on a GPU machine is not
    # passed over in silence.
    assert machine.make("setup")[0] == 0
    (machine.folder / "programs/nvidia-smi").write_text(NVIDIA_SMI, encoding="utf-8")
    assert machine.make("setup")[0] == 0
    code, stderr, _ = machine.make("setup", "TORCH_BUILD=cpu")
    assert (
        code == 2
        and "has the cuda build of torch, and this needs the cpu build; remove it" in stderr
    )
    code, stderr, _ = machine.make("setup", "TORCH_BUILD=rocm")
    assert code == 2 and "rocm" in stderr


def test_setup_without_a_network_and_the_wheels_for_it(tmp_path: Path):
    machine = Machine(tmp_path, gpu=True)
    code, stderr, (call,) = machine.make("wheels", "WHEELS=wheels", "WHEELS_MACHINE=aarch64")
    assert code == 0, stderr
    assert call.startswith(
        "download --no-deps --only-binary=:all: --implementation cp --python-version 3.12 "
    )
    assert "--platform manylinux_2_28_aarch64 " in call and "x86_64" not in call
    assert call.endswith("--dest wheels --requirement wheels/requirements.txt")
    lines = (tmp_path / "wheels" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {Requirement(line).name for line in lines if not line.startswith("#")}
    assert required == {*CPU, *GPU} - {"flash-attn"}
    assert f"torch==={CPU['torch']}" in lines, "no CPU build that a local folder may hold"

    _, _, calls = machine.make("setup", "WHEELS=wheels")
    assert [
        call.startswith(f"install --no-index --find-links {tmp_path}/wheels {CONSTRAINTS} ")
        for call in calls
    ] == [True, True]

    code, stderr, _ = machine.make("wheels")
    assert code == 2 and "name a folder: make wheels WHEELS=DIR" in stderr
    (tmp_path / ".venv/.torch").unlink()
    code, stderr, _ = machine.make("setup", "WHEELS=missing")
    assert code == 2 and "WHEELS=missing is not a folder" in stderr


def test_flash_attn_is_built_for_the_gpu_of_the_machine(tmp_path: Path):
    machine = Machine(tmp_path, gpu=True)
    code, stderr, calls = machine.make("flash-attn")
    assert code == 0, stderr
    assert calls[-1] == f"install {CONSTRAINTS} --no-build-isolation flash-attn"
    assert calls[-2].startswith(f"install {CONSTRAINTS} torch==={CPU['torch']} "), (
        "its setup.py imports torch"
    )

    (tmp_path / "programs/nvidia-smi").write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    code, stderr, calls = machine.make("flash-attn")
    assert (
        code == 2 and not calls and "no GPU here: say which one flash-attn is built for" in stderr
    )
    machine.environment["FLASH_ATTN_CUDA_ARCHS"] = "90"
    assert machine.make("flash-attn")[0] == 0
    (tmp_path / "programs/nvcc").write_text("#!/bin/sh\necho release 12.4,\n", encoding="utf-8")
    code, stderr, calls = machine.make("flash-attn")
    assert code == 2 and not calls and "nvcc of CUDA 13 is needed" in stderr


# --- the pins


def test_the_gpu_pins_fit_the_others():
    assert not {*CPU} & {*GPU}, "pinned once"
    # One CUDA release: the toolkit's number is that of the runtime, the compiler and the bindings.
    toolkit = GPU["cuda-toolkit"].release[:2]
    for name in (
        "cuda-bindings",
        "nvidia-cuda-runtime",
        "nvidia-cuda-nvrtc",
        "nvidia-cuda-cupti",
        "nvidia-nvjitlink",
    ):
        assert GPU[name].release[:2] == toolkit, name
    assert all(name.endswith(f"-cu{toolkit[0]}") for name in GPU if re.search(r"-cu\d+$", name))
    # The 2.8 series of flash-attn compiles as C++17, which torch accepts up to 2.13.
    assert GPU["flash-attn"].release[:2] != (2, 8) or CPU["torch"] < Version("2.14")
    assert CPU["megatron-core"] == Version("0.16.1")


# --- the containers


def dockerfile_instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of every instruction, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (name.upper(), rest.strip())
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def apptainer_stages(text: str) -> list[dict[str, str]]:
    """The header fields and the sections (by `%name arguments`) of every stage."""
    stages: list[dict[str, str]] = []
    section = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if field := re.match(r"(Bootstrap|From|Stage): (.*)", line):
            if field[1] == "Bootstrap":
                stages.append({})
            stages[-1][field[1]], section = field[2], ""
        elif line.startswith("%"):
            section = line.strip()
            stages[-1][section] = ""
        elif section:
            stages[-1][section] += line.strip() + "\n"
    return stages


def apt_packages(script: str) -> list[list[str]]:
    return [
        words.split()
        for words in re.findall(r"apt-get install -y --no-install-recommends ([^&\n]*)", script)
    ]


@pytest.fixture(scope="module")
def docker() -> list[tuple[str, str]]:
    return dockerfile_instructions(DOCKERFILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def apptainer() -> list[dict[str, str]]:
    return apptainer_stages(APPTAINER.read_text(encoding="utf-8"))


def tracked() -> set[str]:
    """Files that git tracks or would, and their folders; all when this is not a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    files = done.stdout.splitlines() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    return {str(parent) for file in files for parent in (Path(file), *Path(file).parents)}


def test_the_images_are_of_the_cuda_release_that_torch_was_built_for(docker: Any, apptainer: Any):
    images = [rest.split(" ")[0] for name, rest in docker if name == "FROM"]
    cuda = ".".join(map(str, GPU["cuda-toolkit"].release[:2]))
    for image, kind in zip(images, ("devel", "base"), strict=True):
        assert re.fullmatch(
            rf"nvidia/cuda:{cuda}\.\d+-{kind}-ubuntu24\.04@sha256:[0-9a-f]{{64}}", image
        )
    assert [stage["From"].partition("@")[2] for stage in apptainer] == [
        image.partition("@")[2] for image in images
    ]
    assert [stage["Bootstrap"] for stage in apptainer] == ["docker", "docker"]


def test_the_images_copy_what_exists_and_install_through_make(docker: Any, apptainer: Any):
    copies = [
        rest.split() for name, rest in docker if name == "COPY" and not rest.startswith("--from=")
    ]
    sources = [word for words in copies for word in words[:-1]]
    files = [line.split() for line in apptainer[0]["%files"].splitlines() if line]
    assert sorted(source for source, _ in files) == sorted(sources)
    assert all(target == f"/opt/llada/{source}" for source, target in files)
    assert {*sources} <= tracked()
    # All of the project that an install needs: what pyproject.toml reads, and every package.
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "constraints-gpu.txt",
    } <= {*sources}
    assert {"llada", "data_tools", "launch"} <= {*sources}
    allowed = (
        (ROOT / "containers" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    )
    assert "*" in allowed and {*sources} == {line[1:] for line in allowed if line.startswith("!")}

    runs = [rest for name, rest in docker if name == "RUN"]
    targets = ["make flash-attn TORCH_BUILD=cuda", "make setup TORCH_BUILD=cuda"]
    assert [run for run in runs if run.startswith("make ")] == targets
    assert [
        line for line in apptainer[0]["%post"].splitlines() if line.startswith("make ")
    ] == targets
    versions = [word for run in runs for word in re.findall(r"\S+==\S+", run)]
    assert not versions, "versions stand in the constraints alone"
    assert apt_packages(" ; ".join(runs).replace("&&", "\n")) == [
        package for stage in apptainer for package in apt_packages(stage["%post"])
    ]


def test_the_image_is_checked_at_the_end_and_runs_as_a_user(docker: Any, apptainer: Any):
    names = [name for name, _ in docker]
    final = docker[len(names) - 1 - names[::-1].index("FROM") :]
    user = next(index for index, (name, _) in enumerate(final) if name == "USER")
    assert final[user][1] == "llada" and any(
        "useradd --create-home llada" in rest for name, rest in final[:user] if name == "RUN"
    )
    assert ("RUN", "llada doctor") in final[user:]
    assert apptainer[-1]["%test"].split() == ["llada", "doctor"]
    assert not [
        name
        for name in names
        if name not in {"FROM", "SHELL", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "USER", "CMD"}
    ]
    for run in (rest for name, rest in docker if name == "RUN" and "apt-get install" in rest):
        assert "rm -rf /var/lib/apt/lists/*" in run, "no package lists in the image"
    text = DOCKERFILE.read_text(encoding="utf-8") + APPTAINER.read_text(encoding="utf-8")
    assert not re.search(r"password|secret|token|api_key|curl |wget |sudo", text, re.IGNORECASE)


# --- continuous integration


def test_the_workflow_runs_ci_and_no_more_than_it_may():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    steps = job["steps"]
    assert [step["run"] for step in steps if "run" in step][-1] == ".ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)
    for step in steps:
        assert "run" in step or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), (
            "actions by commit"
        )
    assert workflow["permissions"] == {"contents": "read"} and "permissions" not in job
    assert workflow["concurrency"]["cancel-in-progress"] is True and job["timeout-minutes"] == 90
    assert job["container"]["image"].startswith("python:3.11-")
    assert {"push", "pull_request"} == {*workflow[True]}, "YAML 1.1 reads `on` as true"
