"""What users do with an exported folder, as a program that knows torch and Hugging Face's packages
but not this one.

python checks.py EXPORT REFERENCE VERSION OUT: runs every check and writes {name: "" or the
traceback} to OUT/results.json. EXPORT is the folder, REFERENCE holds tensors that another
implementation computed from its weights, VERSION is the transformers to find.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Blocker:
    """Keeps the project's own packages out of sight, installed or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("llada", "data_tools", "megatron", "tests"):
            raise ImportError("out of bounds: " + name)


sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
# Trainer imports it where it is, and this environment's does not fit the companions of an old
# transformers.
sys.modules["datasets"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, TaskType, get_peft_model  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

EXPORT, OUT = Path(sys.argv[1]), Path(sys.argv[4])
REFERENCE = load_file(sys.argv[2])
IDS, MASK, CLEAN, P_MASK = (
    REFERENCE[name] for name in ("input_ids", "attention_mask", "labels", "p_mask")
)


def loaded(**settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(EXPORT, trust_remote_code=True, **settings).eval()


def near(actual: torch.Tensor, wanted: torch.Tensor, relative: float = 1e-5) -> None:
    difference, scale = float((actual - wanted).abs().max()), float(wanted.abs().max())
    assert difference <= relative * scale, f"{difference} of {scale}"


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def loss(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, labels=CLEAN, p_mask=P_MASK).loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def auto_classes() -> None:
    assert transformers.__version__ == sys.argv[3], transformers.__version__
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    config = AutoConfig.from_pretrained(EXPORT, trust_remote_code=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        EXPORT, trust_remote_code=True, output_loading_info=True
    )
    logging.getLogger("transformers").removeHandler(handler)
    assert not any(report.values()), report
    assert not said, said
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert model.can_generate()
    near(logits(model, input_ids=IDS), REFERENCE["logits"])
    same = AutoModel.from_pretrained(EXPORT, trust_remote_code=True)
    assert torch.equal(logits(same, input_ids=IDS), logits(model, input_ids=IDS))
    tokenizer = AutoTokenizer.from_pretrained(EXPORT, trust_remote_code=True)
    assert tokenizer.mask_token_id == config.mask_token_id == int(REFERENCE["mask_id"])
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a mask?"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer(chat, add_special_tokens=False)["input_ids"] == REFERENCE["chat"].tolist()


def weight_files() -> None:
    """The index, as safetensors reads the files."""
    index = json.loads((EXPORT / "model.safetensors.index.json").read_text())
    files = sorted(EXPORT.glob("*.safetensors"))
    assert len(files) > 2
    assert {path.name for path in files} == set(index["weight_map"].values())
    size = 0
    for path in files:
        with safe_open(path, "pt") as opened:
            assert set(opened.keys()) == {
                name for name, file in index["weight_map"].items() if file == path.name
            }
            tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118  (it is no dict)
        size += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    assert size == index["metadata"]["total_size"]


def padding() -> None:
    real = MASK.bool()
    for kind in (torch.long, torch.bool, torch.float32):
        near(
            logits(loaded(), input_ids=IDS, attention_mask=MASK.to(kind))[real],
            REFERENCE["padded"][real],
        )
    pairs = (real[:, None, :, None] == real[:, None, None, :]) | ~real[:, None, :, None]
    near(logits(loaded(), input_ids=IDS, attention_mask=pairs)[real], REFERENCE["padded"][real])


def embeddings_instead_of_ids() -> None:
    model = loaded()
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(
        logits(model, inputs_embeds=embedded, attention_mask=MASK),
        logits(model, input_ids=IDS, attention_mask=MASK),
    )


def attention_of_both_kinds() -> None:
    for kind in ("sdpa", "eager"):
        model = loaded(attn_implementation=kind)
        assert model.config._attn_implementation == kind
        near(logits(model, input_ids=IDS), REFERENCE["logits"])
        near(
            logits(model, input_ids=IDS, attention_mask=MASK)[MASK.bool()],
            REFERENCE["padded"][MASK.bool()],
        )
    assert loaded().config._attn_implementation == "sdpa"


def flash_kernel(
    q: Any, k: Any, v: Any, *rest: Any, causal: bool, softmax_scale: Any = None, **settings: Any
) -> torch.Tensor:
    """What flash-attn computes for [b, s, heads, head_dim], by a plain softmax."""
    assert not causal and softmax_scale is None and not any(rest) and not any(settings.values())
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def flash_varlen_kernel(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    **settings: Any,
) -> torch.Tensor:
    """The same for rows one after the other, [tokens, heads, head_dim]."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and int(max_seqlen_q) == int(
        max_seqlen_k
    ) == int(cu_seqlens_q.diff().max())
    rows = itertools.pairwise(cu_seqlens_q.tolist())
    return torch.cat(
        [flash_kernel(*(x[None, a:b] for x in (q, k, v)), **settings)[0] for a, b in rows]
    )


def pad(x: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    return (
        x.new_zeros(batch * length, *x.shape[1:])
        .index_copy(0, indices, x)
        .unflatten(0, (batch, length))
    )


def flash_attention() -> None:
    """transformers' own unpadding and padding around stand-ins for the kernels, which need
    a GPU.
    """
    import transformers.modeling_flash_attention_utils as utils

    if hasattr(utils, "_lazy_imports"):
        kernels = (flash_kernel, flash_varlen_kernel, None, utils._pad_input, utils._unpad_input)
        utils._lazy_imports = lambda *arguments, **settings: kernels
    else:
        parts = {
            "flash_attn_func": flash_kernel,
            "flash_attn_varlen_func": flash_varlen_kernel,
            "pad_input": pad,
        }
        vars(utils).update(
            {**parts, "index_first_axis": lambda x, i: x[i], "_flash_supports_window_size": True}
        )
    model = loaded()
    model.config._attn_implementation = "flash_attention_2"
    near(logits(model, input_ids=IDS), REFERENCE["logits"])
    near(
        logits(model, input_ids=IDS, attention_mask=MASK)[MASK.bool()],
        REFERENCE["padded"][MASK.bool()],
    )


def saved_again() -> None:
    model, folder = loaded(), OUT / "again"
    model.save_pretrained(folder, max_shard_size="200KB")
    assert {path.name for path in EXPORT.glob("*.py")} <= {path.name for path in folder.iterdir()}
    before, after = (
        model.state_dict(),
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).state_dict(),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stored = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert (
        stored.keys()
        == json.loads((EXPORT / "model.safetensors.index.json").read_text())["weight_map"].keys()
    )
    was, now = (json.loads((path / "config.json").read_text()) for path in (EXPORT, folder))
    spelling = {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"}
    assert {n: v for n, v in was.items() if n not in spelling} == {
        n: v for n, v in now.items() if n in was.keys() - spelling
    }


def checkpointed_gradients() -> None:
    model = loaded().train()
    wanted = gradients(model)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.transformer["blocks"][0].register_forward_pre_hook(
        lambda *arguments: calls.append(1)
    )
    actual = gradients(model)
    assert len(calls) == 2
    assert all(torch.equal(actual[name], wanted[name]) for name in wanted)


def compiled_in_one_graph() -> None:
    model = loaded()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mask in (
        None,
        MASK,
        MASK.bool(),
        MASK.bool()[:, None, None, :].expand(-1, 1, MASK.shape[1], -1),
    ):
        near(
            logits(compiled, input_ids=IDS, attention_mask=mask),
            logits(model, input_ids=IDS, attention_mask=mask),
        )


def mapped_to_devices() -> None:
    near(logits(loaded(device_map="auto"), input_ids=IDS), REFERENCE["logits"])
    parts = ["wte", "blocks.0", "blocks.1", "ln_f"] + ["ff_out"] * any(
        "ff_out" in n for n in loaded().model.transformer
    )
    for disk in parts:
        where = {f"model.transformer.{part}": "disk" if part == disk else "cpu" for part in parts}
        model = loaded(device_map=where, offload_folder=OUT / "offload" / disk)
        assert any(p.is_meta for p in model.model.transformer.get_submodule(disk).parameters()), (
            disk
        )
        near(
            logits(model, input_ids=IDS, attention_mask=MASK)[MASK.bool()],
            REFERENCE["padded"][MASK.bool()],
        )
        generated = model.diffusion_generate(REFERENCE["prompt"], max_new_tokens=8, steps=4)
        assert torch.equal(
            generated, loaded().diffusion_generate(REFERENCE["prompt"], max_new_tokens=8, steps=4)
        )
    most = int(0.75 * sum(p.numel() * p.itemsize for p in loaded().parameters()))
    spilled = loaded(
        device_map="auto", max_memory={"cpu": most}, offload_folder=OUT / "offload" / "auto"
    )
    assert "disk" in spilled.hf_device_map.values(), spilled.hf_device_map
    near(logits(spilled, input_ids=IDS), REFERENCE["logits"])


def one_step(batch: int) -> dict[str, torch.Tensor]:
    """Weights after one step of gradient descent on four rows, by transformers' own Trainer."""
    model, rows = (
        loaded(),
        [
            {"input_ids": i, "labels": c, "p_mask": p}
            for i, c, p in zip(IDS, CLEAN, P_MASK, strict=True)
        ],
    )
    settings = {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(
        str(OUT / "trainer"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=len(rows) // batch,
        **settings,
        **quiet,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    return {name: p.detach() for name, p in model.named_parameters()}


def trainer_and_its_accumulation() -> None:
    """Four micro batches of one row, and one batch of four, take the step that the gradient of the
    mean loss says.

    Trainer of 4.46 and 4.47 forgets to divide the loss of a model without **kwargs by the number of
    micro batches, which no model can mend: there only the one batch is right.
    """
    start = loaded()
    assert abs(float(loss(start)) - float(REFERENCE["loss"])) <= 1e-5 * float(REFERENCE["loss"])
    gradient = gradients(start)
    for batch in (4,) if transformers.__version__.startswith(("4.46.", "4.47.")) else (1, 4):
        end = one_step(batch)
        for name, before in start.named_parameters():
            # The step is rounded where it is added to the weight, to 2^-24 of it.
            error = (end[name] - (before - gradient[name])).norm()
            assert error <= 1e-4 * gradient[name].norm() + 2**-23 * before.norm(), (
                batch,
                name,
                float(error / gradient[name].norm()),
            )


def adapted(target: Any, expected: set[str]) -> None:
    base = loaded()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=target, r=4, lora_alpha=64)
    )
    actual = {
        name.split(".lora_A")[0].removeprefix("base_model.model.model.transformer.")
        for name in model.state_dict()
        if "lora_A" in name
    }
    assert actual == expected, actual ^ expected
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first moves one half of each adapter only
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        original = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert p.requires_grad == ("lora_" in name), name
        assert "lora_" in name or torch.equal(p, before[original]), name
    trained = logits(model, input_ids=IDS)
    assert float((trained - REFERENCE["logits"]).abs().max()) > 1e-2 * float(trained.abs().max()), (
        "the adapters change the logits"
    )
    folder = OUT / "-".join(["adapter", *([target] if isinstance(target, str) else target)])
    model.save_pretrained(folder)
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(), folder), input_ids=IDS), trained)
    near(logits(model.merge_and_unload(), input_ids=IDS), trained, 1e-4)


def adapters() -> None:
    blocks = range(len(loaded().model.transformer["blocks"]))
    untied = "ff_out" in loaded().model.transformer
    adapted(
        ["q_proj", "v_proj"],
        {f"blocks.{i}.{name}" for i in blocks for name in ("q_proj", "v_proj")},
    )
    # The published name of the head is also that of a part of every block.
    adapted(["ff_out"], {f"blocks.{i}.ff_out" for i in blocks} | ({"ff_out"} if untied else set()))
    linear = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    # peft of that time goes by last names and cannot tell the head, to be left out, from the parts
    # of the blocks.
    with_head = {"ff_out"} if untied and transformers.__version__.startswith("4.") else set()
    adapted("all-linear", {f"blocks.{i}.{name}" for i in blocks for name in linear} | with_head)


def generated_by_diffusion() -> None:
    model, prompt = loaded(), REFERENCE["prompt"]
    generated = model.diffusion_generate(prompt, max_new_tokens=16, steps=8)
    assert torch.equal(generated, REFERENCE["generated"])
    generated = model.diffusion_generate(
        prompt, max_new_tokens=16, steps=8, block_length=4, cfg_scale=0.5
    )
    assert torch.equal(generated, REFERENCE["guided"])
    padded = torch.nn.functional.pad(prompt, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (3, 0))
    assert torch.equal(
        model.diffusion_generate(padded, mask, max_new_tokens=16, steps=8)[:, 3:],
        REFERENCE["generated"],
    )
    assert model.config.tokenizer_vocab_size == int(REFERENCE["num_tokens"])


def generated_as_in_transformers() -> None:
    """`generate`, a pipeline, and a pipeline of a conversation; what follows an end is padding."""
    model, prompt = loaded(), REFERENCE["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(EXPORT, trust_remote_code=True)
    generated = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        steps=8,
        do_sample=False,
    )
    ends = torch.tensor(model.generation_config.eos_token_id)
    assert ends.dim() == 1 and int(ends[0]) == model.config.eos_token_id
    for row, wanted in zip(generated.tolist(), REFERENCE["generated"].tolist(), strict=True):
        end = next(
            (i for i in range(prompt.shape[1], len(wanted)) if wanted[i] in ends), len(wanted)
        )
        assert row == wanted[: end + 1] + [model.config.pad_token_id] * (len(wanted) - end - 1)
    writer = transformers.pipeline(
        "text-generation", model=model, tokenizer=tokenizer, device="cpu"
    )
    inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True)
    assert writer("def main(", max_new_tokens=8, do_sample=False)[0]["generated_text"] == text
    talk = [{"role": "user", "content": "What is a mask?"}]
    answer = writer(talk, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
    assert answer["role"] == "assistant" and isinstance(answer["content"], str)
    try:
        writer("def main(", max_new_tokens=8, top_p=0.9)
    except ValueError as error:
        assert "top_p=0.9 not supported: text is written by diffusion" in str(error), error
    else:
        raise AssertionError("top_p is not refused")


def weights_of_another_config() -> None:
    folder = OUT / "other"
    shutil.copytree(EXPORT, folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = {config["n_layers"] + 1: "missing", config["n_layers"] - 1: "unexpected"}
    for layers, kind in kinds.items():
        (folder / "config.json").write_text(json.dumps({**config, "n_layers": layers}))
        try:
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        except ValueError as error:
            assert f"are not those of its config.json: {kind}: " in str(error), error
        else:
            raise AssertionError(f"{kind} weights are not refused")


def code_of_the_model_card() -> None:
    """Every program on the card runs as it stands there: sampling, and fine-tuning with
    transformers' Trainer.
    """
    blocks = (EXPORT / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    os.chdir(OUT)
    for block in blocks:
        exec(block.split("```")[0].replace('folder = "."', f"folder = {str(EXPORT)!r}"), {})
    before, after = (
        loaded().state_dict(),
        AutoModelForCausalLM.from_pretrained(
            OUT / "finetuned", trust_remote_code=True
        ).state_dict(),
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before), (
        "every weight is trained"
    )


CHECKS: tuple[Callable[[], None], ...] = (
    auto_classes,
    weight_files,
    padding,
    embeddings_instead_of_ids,
    attention_of_both_kinds,
    flash_attention,
    saved_again,
    checkpointed_gradients,
    compiled_in_one_graph,
    mapped_to_devices,
    trainer_and_its_accumulation,
    adapters,
    generated_by_diffusion,
    generated_as_in_transformers,
    weights_of_another_config,
    code_of_the_model_card,
)


def main() -> None:
    torch.set_num_threads(2)
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = ""
        except Exception:  # whatever it is, the other checks are worth running
            results[check.__name__] = traceback.format_exc()
    assert not {"llada", "data_tools", "megatron"} & sys.modules.keys()
    (OUT / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
