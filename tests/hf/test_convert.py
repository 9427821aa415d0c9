"""`llada convert to-hf`: files, refusals, and the folder in a process that knows nothing of us."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llada.chat.format import ChatFormat, Message
from llada.checkpoint import reading as module_of_stored
from llada.checkpoint.canonical import CheckpointWeights, all_rows
from llada.checkpoint.format import read_state, resolve_checkpoint, trained_config
from llada.checkpoint.reading import StoredTensors
from llada.checkpoint.writing import write_model
from llada.config.sections import ModelSection
from llada.errors import RunError, UserError
from llada.files import flush_in_background
from llada.hf import exporting as module
from llada.hf.exporting import ExportOptions, export, parse_size, to_hf
from llada.hf.tensor_files import write_safetensors
from llada.tokenizer import Tokenizer
from tests import processes
from tests.hf.folders import SIZES, published_tensors
from tests.model.in_memory import InMemory
from tests.stand_ins import like
from tests.workplace import Workplace

STRANGER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llada", "megatron"):
            raise ImportError("out of bounds: " + name)

sys.meta_path.insert(0, Blocker())
import json
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, reference = sys.argv[1:]
for name in ("llada", "megatron"):
    try:
        __import__(name)
        sys.exit(name + " can be imported")
    except ImportError:
        pass
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
expected = load_file(reference)
with torch.no_grad():
    logits = model(expected["input_ids"]).logits
    padded = torch.nn.functional.pad(expected["input_ids"], (5, 0), value=tokenizer.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(expected["input_ids"]), (5, 0))
    beside = model(padded, attention_mask=mask).logits[:, 5:]
scale = expected["logits"].abs().max()
messages = [{"role": "user", "content": "What is a mask?"}]
print(json.dumps({
    "dtype": str(model.dtype),
    "difference": float((logits - expected["logits"]).abs().max() / scale),
    "padding": float((beside - expected["logits"]).abs().max() / scale),
    "same": float((logits[0] - logits[1]).abs().max()),
    "shape": list(expected["input_ids"].shape),
    "chat": tokenizer(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        add_special_tokens=False)["input_ids"],
    "mask": tokenizer.mask_token_id, "eos": tokenizer.eos_token_id,
}))
"""


def test_plain_transformers_computes_the_training_models_logits(
    workplace: Workplace, tmp_path: Path
) -> None:
    folder, reference = tmp_path / "export", tmp_path / "reference.safetensors"
    output = export(
        str(workplace.folder / "whole"), str(folder), True, str(reference), ExportOptions()
    )
    assert "verified on 4 x 128 tokens" in output
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER, str(folder), str(reference)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["dtype"] == "torch.float32"
    assert result["shape"] == [4, 128]
    assert result["difference"] <= 1e-5
    assert result["padding"] <= 1e-5, "attention_mask is honoured"
    assert result["same"] > 0.1
    tokenizer = Tokenizer.load(folder)
    assert (result["mask"], result["eos"]) == (tokenizer.mask_id, tokenizer.eos_id)
    assert (
        result["chat"]
        == ChatFormat(tokenizer).prompt([Message("user", "What is a mask?")]).tolist()
    )
    ids = load_file(reference)["input_ids"]
    assert ids.dtype == torch.int64
    masked = (ids == tokenizer.mask_id).float().mean(-1)
    assert ((masked > 0.4) & (masked < 0.6)).all()


def weights_of(folder: Path) -> CheckpointWeights:
    return CheckpointWeights(
        StoredTensors(folder / "model"), trained_config(read_state(folder)).model
    )


def test_weights_are_dealt_into_files_of_a_limited_size(
    workplace: Workplace, tmp_path: Path
) -> None:
    source = weights_of(resolve_checkpoint(workplace.folder / "whole"))
    tensors = {name: all_rows(source, name) for name in source.shapes}
    limit = 100_000
    count = write_safetensors(tmp_path, source, torch.bfloat16, limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert count == len(list(tmp_path.glob("*.safetensors"))) > 2
    assert index["weight_map"].keys() == source.shapes.keys()
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors.values())
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / file)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        assert len(held) == 1 or sum(2 * tensor.numel() for tensor in held.values()) <= limit
        for name, tensor in held.items():
            assert torch.equal(tensor, tensors[name].bfloat16())


def test_the_config_names_the_longest_sequence_of_the_lineage(
    workplace: Workplace, tmp_path: Path
) -> None:
    source = tmp_path / "later"
    shutil.copytree(workplace.folder / "whole", source)
    path = resolve_checkpoint(source) / "state.json"
    state = json.loads(path.read_text())
    state["lineage"] = [{"init_from": "before", "sequence_length": 4096}]
    path.write_text(json.dumps(state))
    to_hf(source, tmp_path / "out", ExportOptions(dtype="bf16", checksums=False))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_sequence_length"] == 4096
    assert config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] == config["embedding_size"] == 512


def copy(workplace: Workplace, tmp_path: Path) -> Path:
    target = tmp_path / "damaged"
    shutil.copytree(resolve_checkpoint(workplace.folder / "whole"), target)
    return target


def evil(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(path.parent / "owned"),)

    path.write_bytes(pickle.dumps(Evil()))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("COMMITTED", Path.unlink, "COMMITTED"),
        ("state.json", truncate, "state.json is damaged"),
        ("model/.metadata", Path.unlink, ".metadata cannot be read"),
        ("model/.metadata", truncate, ".metadata is damaged"),
        ("model/.metadata", evil, "asks for posix.mkdir"),
        ("model/*.distcp", truncate, "is damaged at"),
        ("model/*.distcp", Path.unlink, "is damaged at"),
        ("tokenizer/tokenizer.json", Path.unlink, "no tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(
    name: str, damage: Any, message: str, workplace: Workplace, tmp_path: Path
) -> None:
    source = copy(workplace, tmp_path)
    for path in source.glob(name):
        damage(path)
    with pytest.raises(UserError) as caught:
        to_hf(source, tmp_path / "deep" / "out", ExportOptions(checksums=False))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]
    assert not list(source.rglob("owned"))


def test_a_config_that_is_not_the_weights_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    source = copy(workplace, tmp_path)
    state = json.loads((source / "state.json").read_text())
    norms = r"input|layer_norm_weight is \[2, 64\], not \[3, 64\]"
    for change, message in (
        ({"ffn_hidden_size": 96}, r"linear_fc1.weight is \[2, 256, 64\], not \[2, 192, 64\]"),
        ({"num_layers": 3}, norms),
    ):
        (source / "state.json").write_text(
            json.dumps(
                {
                    **state,
                    "config": {**state["config"], "model": {**state["config"]["model"], **change}},
                }
            )
        )
        with pytest.raises(UserError, match=message):
            to_hf(source, tmp_path / "out", ExportOptions(checksums=False))


def test_an_output_that_exists_is_replaced_only_when_asked(
    workplace: Workplace, tmp_path: Path
) -> None:
    source, out = str(workplace.folder / "whole"), tmp_path / "out"
    to_hf(source, out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"OUT: .* exists; --force replaces"):
        to_hf(source, out)
    to_hf(source, out, ExportOptions(force=True))
    assert (out / "model.safetensors").read_bytes() == before
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"contains 'thesis.txt'"):
        to_hf(source, out, ExportOptions(force=True))
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_folder_that_computes_something_else_is_not_kept(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate: --verify looks at the folder, and a wrong one never gets its name."""

    class Wrong(CheckpointWeights):
        def rows(self, name: str, first: int, last: int) -> torch.Tensor:
            tensor = super().rows(name, first, last)
            return tensor.flip(0) if name.endswith("blocks.1.k_proj.weight") else tensor

    monkeypatch.setattr(module, "CheckpointWeights", Wrong)
    with pytest.raises(RunError, match="computes other logits"):
        export(str(workplace.folder / "whole"), str(tmp_path / "out"), True, None, ExportOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "checkpoint: no folder 'nowhere'"),
        (["a" * 300, "out"], "checkpoint: no folder 'aaa"),
        (
            ["whole", "out", "--dtype", "fp8"],
            "--dtype: 'fp8' is not allowed; one of fp32, bf16, fp16",
        ),
        (["whole", "corpus"], "OUT: 'corpus' exists"),
        (
            ["whole", "out", "--reference", "/proc/no/r.safetensors"],
            "--reference: '/proc/no/r.safetensors' cannot be created (No such file",
        ),
    ],
)
def test_refusals_of_the_command(arguments: list[str], message: str, workplace: Workplace) -> None:
    done = workplace.run("convert", "to-hf", *arguments, code=2)
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not (workplace.folder / "out").exists()


# -- averages, sizes, checksums, the model card ----------------------------------------------------


@pytest.fixture(scope="module")
def half(workplace: Workplace) -> Path:
    """A run in bf16, whose weights are rounded and whose masters are not."""
    brief = {
        "train": {"steps": 4},
        "checkpoint": {"every": 2},
        "validation": {"every": 4, "windows": 8},
    }
    workplace.run(
        "pretrain",
        workplace.config("half.yaml", run={"dir": "half", "threads": 2}, precision="bf16", **brief),
    )
    return workplace.folder / "half"


@pytest.mark.slow
def test_the_mean_of_checkpoints_is_that_of_their_masters(half: Path, tmp_path: Path) -> None:
    """Read here with torch's own checkpoint reader."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    output = to_hf(half, tmp_path / "out", ExportOptions(dtype="fp32", average=2))
    assert output.endswith("the mean of the checkpoints after steps 2, 4")
    both = []
    for step in (2, 4):
        dcp_to_torch_save(half / "checkpoints" / f"step_{step:08d}" / "model", tmp_path / "all.pt")
        # our own file, of the line before
        both.append(torch.load(tmp_path / "all.pt", weights_only=False))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for key, stored in (
        ("wte", "embedding.word_embeddings"),
        ("ff_out", "output_layer"),
        ("ln_f", "decoder.final_layernorm"),
    ):
        masters = [each[f"optimizer.state.param.{stored}.weight"] for each in both]
        wanted = ((masters[0].double() + masters[1].double()) / 2).float()
        assert torch.equal(exported[f"model.transformer.{key}.weight"], wanted)
        assert not torch.equal(wanted, wanted.bfloat16().float())
    down = [each["optimizer.state.param.decoder.layers.mlp.linear_fc2.weight"] for each in both]
    wanted = ((down[0].double() + down[1].double()) / 2).float()
    assert torch.equal(exported["model.transformer.blocks.1.ff_out.weight"], wanted[1])
    assert (
        "mean of the checkpoints after steps 2, 4" in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.slow
def test_fp32_of_a_bf16_run_is_its_masters_and_verified_as_such(half: Path, tmp_path: Path) -> None:
    """The gate is as narrow as for an fp32 run: the training model computes with the masters, or
    their mean, too.
    """
    for name, average in (("out", 1), ("mean", 2)):
        output = export(
            str(half), str(tmp_path / name), True, None, ExportOptions("fp32", average=average)
        )
        assert "in fp32 from the run's fp32 masters" in output and "allowed 1e-05" in output
        values = load_file(tmp_path / name / "model.safetensors")["model.transformer.wte.weight"]
        assert not torch.equal(values, values.bfloat16().float())


SLOW_WRITER = """
import sys, time
from llada.hf import exporting
real = exporting.write_safetensors

def write(*arguments):
    real(*arguments)
    print("written", flush=True)
    time.sleep(60)

exporting.write_safetensors = write
sys.argv = ["llada", "convert", "to-hf", *sys.argv[1:]]
from llada.cli import main
main()
"""


def test_sigterm_leaves_nothing_half_written(workplace: Workplace, tmp_path: Path) -> None:
    process = workplace.start(
        str(workplace.folder / "whole"), str(tmp_path / "out"), command=("-c", SLOW_WRITER)
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    assert list(tmp_path.iterdir())
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130  # as after Ctrl-C
    assert not list(tmp_path.iterdir())


def test_the_mean_of_one_is_the_checkpoint_and_too_many_are_refused(
    workplace: Workplace, tmp_path: Path
) -> None:
    source = workplace.folder / "whole"
    with pytest.raises(
        UserError,
        match=r"--average: needs 4 checkpoints, but .* has only 3 complete ones up to step_0{6}12",
    ):
        to_hf(source, tmp_path / "out", ExportOptions(average=4))
    with pytest.raises(
        UserError,
        match=r"--average: needs 2 checkpoints, but .* has only 1 complete ones up to step_0{6}04",
    ):
        to_hf(source / "checkpoints" / "step_00000004", tmp_path / "out", ExportOptions(average=2))
    with pytest.raises(UserError, match=r"--average: 0 is less than 1"):
        to_hf(source, tmp_path / "out", ExportOptions(average=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5 gb", 1_500_000_000),
        ("4096", 4096),
        ("7kb", 7000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "5 apples", "-3GB", "0", "5GBit", "5IB", "1e9", f"{'9' * 400}TB"],
    ids=lambda text: text[:8],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--max-shard-size: '.*' is not a size"):
        parse_size(text)


def test_a_flipped_bit_is_found_before_anything_is_written(
    workplace: Workplace, tmp_path: Path
) -> None:
    source = copy(workplace, tmp_path)
    path = sorted(source.glob("model/*.distcp"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"\.distcp has another checksum than its marker says; the checkpoint is"
    ):
        to_hf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_card_says_what_the_checkpoint_knows(
    workplace: Workplace, tmp_path: Path
) -> None:
    to_hf(workplace.folder / "whole", tmp_path / "out", ExportOptions(license="apache-2.0"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\n")
    last = [
        json.loads(line)
        for line in (workplace.folder / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    nelbo = next(line for line in reversed(last) if "nelbo_per_token" in line)
    assert (
        f"| corpus | {nelbo['nelbo_per_token']:.4f} ± {nelbo['nelbo_per_token_se']:.4f} |"
        f" {nelbo['bits_per_byte']:.4f} ±" in card
    )
    assert "after step 12" in card and "| steps, tokens seen | 12, 6,144 |" in card
    shapes = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{sum(tensor.numel() for tensor in shapes.values()):,} (" in card
    assert str(workplace.folder) not in card
    example = Path(module.__file__).with_name("finetuning_example.py").read_text()
    assert f"```python\n{example}```" in card
    assert (
        f"```python\n{example}```" in (Path(__file__).parents[2] / "docs" / "sft.md").read_text()
    ), "the docs show the same program"
    tokenizer = Tokenizer.load(tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_id, tokenizer.id_of("<|eot_id|>")]
    code = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace('folder = "."', f"folder = {str(tmp_path / 'out')!r}")
    )
    process = processes.start("-c", code, cwd=tmp_path, env=dict(os.environ))
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error[-2000:]
    with pytest.raises(
        UserError, match=r"--license: 'do what you want' is not an identifier of a license"
    ):
        to_hf(
            workplace.folder / "whole",
            tmp_path / "other",
            ExportOptions(license="do what you want"),
        )


class Counting(InMemory):
    """Notes the largest part that is asked for at a time."""

    largest = 0

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        rows = super().rows(name, first, last)
        self.largest = max(self.largest, rows.numel())
        return rows


def test_no_tensor_is_ever_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways, blocks of at most so many values; what is read of a file is what was asked for."""
    for constant in (
        "llada.model.weights.BLOCK_ELEMENTS",
        "llada.hf.tensor_files.BLOCK_ELEMENTS",
        "llada.checkpoint.writing.BLOCK_ELEMENTS",
    ):
        monkeypatch.setattr(constant, 1000)
    model = ModelSection(**{**SIZES, "num_query_groups": 4})
    source = Counting(published_tensors(model))
    write_model(tmp_path, source, model, torch.float32)
    assert 900 < source.largest <= 1000
    stored = CheckpointWeights(StoredTensors(tmp_path), model)
    read: list[int] = []
    real = module_of_stored.read_into
    monkeypatch.setattr(
        module_of_stored,
        "read_into",
        lambda file, values: (read.append(values.numel()), real(file, values)),
    )
    (tmp_path / "out").mkdir()
    assert write_safetensors(tmp_path / "out", stored, torch.float32, 10**9) == 1
    assert max(read) <= 1000 and sum(read) == sum(
        tensor.numel() for tensor in source.tensors.values()
    )
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in source.tensors.items())


def test_a_disk_that_fails_to_flush_is_no_finished_export(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the thread that flushes is told is not lost, though the file may be synced without a
    complaint later.
    """

    flushed = threading.Event()

    def fail(descriptor: int) -> None:
        flushed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("llada.files.os", like(os, fdatasync=fail))
    with pytest.raises(OSError, match="Input/output error"), flush_in_background(tmp_path):
        (tmp_path / "file").write_text("text")
        assert flushed.wait(60)
