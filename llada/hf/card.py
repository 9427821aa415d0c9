"""The model card of an exported folder: README.md, with the facts that the checkpoint records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import llada
from llada.checkpoint.format import CheckpointState, TrainedConfig
from llada.errors import UserError
from llada.evaluation.estimates import with_error
from llada.model.weights import num_parameters
from llada.types import JsonObject

_HEAD = """---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---

# {title}

{description}
Exported with `llada` {version}.
"""
_DIFFUSION_DESCRIPTION = """\
This model predicts masked tokens from the text on both sides.
It writes by starting from masks and filling them in, a few in each step
([LLaDA](https://arxiv.org/abs/2502.09992))."""
_CAUSAL_DESCRIPTION = """\
This model predicts each token from those before it: the autoregressive baseline of masked diffusion
models ([LLaDA](https://arxiv.org/abs/2502.09992)), in the layout of Llama."""
_CONVERTED = """\
These are the unchanged weights of a {architecture}, in the layout of
[LLaDA](https://arxiv.org/abs/2502.09992). Nothing was trained since the conversion.
See the original model for its uses and its license."""
_DIFFUSION_USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the path of this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
{prompt}
ids = model.diffusion_generate(**inputs, max_new_tokens=64, steps=64)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Fewer `steps` are faster and lower the quality.
The model is not causal.
`generate()`, and with it `pipeline("text-generation")`, calls `diffusion_generate`,
ends a text at EOS, and refuses settings of autoregressive decoding such as `top_p` or `num_beams`.
"""
_CAUSAL_USE = """
## Use

Every text begins with the token `bos_token_id` of `config.json`, which the tokenizer may not add.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the path of this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
text = tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
inputs = torch.tensor([[model.config.bos_token_id, *text]])
ids = model.generate(
    inputs,
    attention_mask=torch.ones_like(inputs),
    max_new_tokens=64,
    suppress_tokens=[tokenizer.mask_token_id],
)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```
"""
_FINE_TUNE = """
## Fine-tune

With the Trainer of transformers. The data collator applies the noise.
Gradient accumulation requires transformers 4.48 or later.

```python
{code}```
"""
_PROMPT = 'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)'
_CHAT_PROMPT = """\
messages = [{"role": "user", "content": "What is a mask?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(
    prompt, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False
)"""


class _Kind(NamedTuple):
    """What the card says of all models of a kind.

    Attributes:
        tags: for the Hugging Face Hub.
        title, description: at the top.
        architecture: in the table.
        use: a program that writes a text; `{prompt}` stands for the lines that make the inputs.
        loss: what the validation measures.
        about_loss: a sentence on it.
        noise: what it was measured with besides the text.
    """

    tags: tuple[str, ...]
    title: str
    description: str
    architecture: str
    use: str
    loss: str
    about_loss: str
    noise: str = ""


_DIFFUSION = _Kind(
    tags=("llada", "masked-diffusion", "diffusion-language-model"),
    title="A masked diffusion language model",
    description=_DIFFUSION_DESCRIPTION,
    architecture="Llama-like transformer without the causal mask: RMSNorm, RoPE, SwiGLU, no biases",
    use=_DIFFUSION_USE,
    loss="NELBO",
    about_loss="The NELBO is an upper bound of the negative log likelihood.",
    noise=" with fixed noise",
)
_CAUSAL = _Kind(
    tags=("llada", "autoregressive"),
    title="An autoregressive language model",
    description=_CAUSAL_DESCRIPTION,
    architecture="Llama: RMSNorm, RoPE, SwiGLU, no biases",
    use=_CAUSAL_USE,
    loss="negative log likelihood",
    about_loss="The likelihood is exact; the NELBO of a diffusion model is an upper bound.",
)
_TASKS = {"pretrain": "pretraining", "sft": "supervised fine-tuning"}


def check_license(name: str) -> None:
    """Raise UserError unless this can be the identifier of a license on the Hugging Face Hub."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise UserError(
            f"--license: '{name}' is not an identifier of a license, as apache-2.0 or mit; `other`"
            " for one of your own"
        )


def model_card(
    state: CheckpointState,
    trained: TrainedConfig,
    dtype: str,
    license_: str,
    has_template: bool,
    averaged: list[int],
) -> str:
    """Return the text of README.md.

    Args:
        state: CheckpointState of the checkpoint.
        trained: Its model.
        dtype: Type of the exported weights.
        license_: Identifier of the license.
        has_template: Whether the tokenizer has a chat template.
        averaged: Steps of the checkpoints whose mean this is; empty for a single checkpoint.
    """
    # An imported model that no step was trained has nothing to say about training.
    converted = None
    imports = _imports(state)
    if imports and not state.step:
        converted = imports[0]
    kind = _CAUSAL if trained.is_causal else _DIFFUSION
    title = kind.title
    description = kind.description
    if converted:
        title = f"Converted weights of a {converted}"
        description = _CONVERTED.format(architecture=converted)
    head = _HEAD.format(
        license=license_,
        tags="\n".join(f"- {tag}" for tag in kind.tags),
        version=llada.__version__,
        title=title,
        description=description,
    )
    rows = [("kind", kind.architecture), *_architecture(trained, dtype)]
    sections = [head, "\n## Architecture\n\n", _table(rows)]
    if not converted:
        sections += ["\n## Training\n\n", _table(_training(state, averaged))]
    # The recorded validation is that of one checkpoint, not of the mean.
    if state.validation and not averaged:
        sections += ["\n## Validation\n\n", _validation(state.validation, kind)]
    is_chat_model = has_template and state.config.get("task") == "sft"
    prompt = _CHAT_PROMPT if is_chat_model else _PROMPT
    sections.append(kind.use.replace("{prompt}", prompt))
    # The example applies the noise of masked diffusion.
    if has_template and not trained.is_causal:
        example = Path(__file__).with_name("finetuning_example.py")
        sections.append(_FINE_TUNE.format(code=example.read_text(encoding="utf-8")))
    return "".join(sections)


def _imports(state: CheckpointState) -> list[str]:
    """Architectures of the imported models that the weights go back to, oldest first."""
    return [entry["architecture"] for entry in state.lineage if "imported" in entry]


def _table(rows: list[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _architecture(trained: TrainedConfig, dtype: str) -> list[tuple[str, str]]:
    model = trained.model
    parameters = f"{num_parameters(model):,}"
    without_vocabulary = f"{num_parameters(model, embedding=False):,}"
    heads = f"{model.num_attention_heads}, of {model.head_dim}"
    if model.num_query_groups:
        heads += f"; {model.kv_heads} for keys and values"
    rows_of_vocabulary = f"{model.vocab_size:,}"
    if model.tie_embeddings:
        rows_of_vocabulary += ", tied with the head"
    return [
        ("parameters", f"{parameters} ({without_vocabulary} without embedding and head), {dtype}"),
        (
            "layers, width, inner width",
            f"{model.num_layers}, {model.hidden_size}, {model.ffn_hidden_size}",
        ),
        ("attention heads", heads),
        ("rows of the vocabulary", rows_of_vocabulary),
        ("RoPE base, norm epsilon", f"{model.rope_theta:g}, {model.norm_eps:g}"),
        ("longest training sequence", f"{trained.longest:,} tokens"),
    ]


def _objective(section: JsonObject) -> str:
    """Describe the objective of a run from the section of its config; an import has none."""
    match section.get("name", "masked"):
        case "autoregressive":
            return "left-to-right prediction"
        case "discrete_steps":
            steps = section.get("steps", 1000)
            return f"masked diffusion in {steps:,} discrete steps (arXiv 2107.03006)"
    words = "masked diffusion (arXiv 2502.09992)"
    if section.get("masking") == "fixed_count":
        words += ", a fixed number of masks"
    elif section.get("schedule", "llada") != "llada":
        words += f", noise schedule {section['schedule']}"
    if section.get("subs"):
        words += "; [MASK] is left out of the softmax (SUBS), which the model does itself"
    return words


def _training(state: CheckpointState, averaged: list[int]) -> list[tuple[str, str]]:
    rows = [
        ("objective", _objective(state.config.get("objective", {}))),
        ("task", _TASKS[state.config["task"]]),
    ]
    imports = _imports(state)
    if imports:
        rows.append(("started from", f"the weights of an imported {imports[0]}"))
    rows.append(("steps, tokens seen", f"{state.step:,}, {state.tokens:,}"))
    tokens_before = [entry["tokens"] for entry in state.lineage if "tokens" in entry]
    if tokens_before:
        rows.append(("tokens seen before, in the runs it started from", f"{sum(tokens_before):,}"))
    if averaged:
        steps = ", ".join(map(str, averaged))
        rows.append(("weights", f"mean of the checkpoints after steps {steps}"))
    return rows


def _validation(line: JsonObject, kind: _Kind) -> str:
    """A table of the held-out text's loss, per corpus and in all, with standard errors."""
    lines = [f"| corpus | {kind.loss}, nats per token | bits per byte |", "|---|---|---|"]
    for name, values in line["corpora"].items():
        lines.append(_validation_row(name, values))
    if len(line["corpora"]) > 1:
        lines.append(_validation_row("all, by weight", line))
    lines += [
        "",
        f"Measured after step {line['step']:,} on held-out text{kind.noise}, ± the standard"
        " error over such text.",
        kind.about_loss,
        "",
    ]
    return "\n".join(lines)


def _validation_row(name: str, values: JsonObject) -> str:
    nelbo = with_error(values, "nelbo_per_token")
    bits = with_error(values, "bits_per_byte")
    return f"| {name} | {nelbo} | {bits} |"
