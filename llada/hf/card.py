"""The model card of an exported folder: README.md with the facts that the checkpoint knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import llada
from llada.checkpoint.format import CheckpointState, TrainedConfig
from llada.errors import UserError
from llada.evaluation.estimates import with_error
from llada.model.weights import num_parameters

_HEAD = """---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags:
- llada
- masked-diffusion
- diffusion-language-model
---

# {title}

{what} Exported with `llada` {version}.
"""
_TRAINED = """It predicts masked tokens from the text on both sides, and writes by starting from masks and filling them in
([LLaDA](https://arxiv.org/abs/2502.09992))."""  # noqa: E501
_CONVERTED = """The weights of a {architecture} as they were, in the layout of [LLaDA](https://arxiv.org/abs/2502.09992): nothing was
trained since. What they are good for, and under which licence, is said where they come from."""  # noqa: E501
_USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or where this folder lies
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
{prompt}
ids = model.diffusion_generate(**inputs, max_new_tokens=64, steps=64)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Fewer `steps` are faster and worse. The model is not causal: `generate()`, and with it `pipeline("text-generation")`, calls
`diffusion_generate`, ends a text at EOS, and refuses what belongs to text from left to right, as `top_p` or `num_beams`.
"""  # noqa: E501
_TUNE = """
## Fine-tune

With transformers' Trainer, whose collator has to apply the noise (transformers 4.48 or later where gradients are accumulated):

```python
{code}```
"""  # noqa: E501
_PLAIN = 'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)'
_CHAT = """messages = [{"role": "user", "content": "What is a mask?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)"""  # noqa: E501


def check_license(name: str) -> None:
    """Raises UserError for what cannot be an identifier of a licence."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise UserError(
            f"--license: '{name}' is not an identifier of a licence, as apache-2.0 or mit; `other`"
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
    """The text of README.md.

    Args:
        state: of the checkpoint.
        trained: its model.
        dtype: of the exported weights.
        license_: identifier of the licence.
        has_template: whether the tokenizer has a chat template.
        averaged: steps of the checkpoints whose mean this is; empty: it is one checkpoint.
    """
    converted = (
        next((entry["architecture"] for entry in state.lineage if "imported" in entry), None)
        if not state.step
        else None
    )
    title = (
        f"Converted weights of a {converted}" if converted else "A masked diffusion language model"
    )
    what = _CONVERTED.format(architecture=converted) if converted else _TRAINED
    parts = [_HEAD.format(license=license_, version=llada.__version__, title=title, what=what)]
    parts.append("\n## Architecture\n\n" + _table(_architecture(trained, dtype)))
    if not converted:
        parts.append("\n## Training\n\n" + _table(_training(state, averaged)))
    if state.validation and not averaged:
        parts.append("\n## Validation\n\n" + _validation(state.validation))
    parts.append(
        _USE.format(prompt=_CHAT if has_template and state.config.get("task") == "sft" else _PLAIN)
    )
    if has_template:
        parts.append(
            _TUNE.format(
                code=Path(__file__).with_name("finetuning_example.py").read_text(encoding="utf-8")
            )
        )
    return "".join(parts)


def _table(rows: list[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _architecture(trained: TrainedConfig, dtype: str) -> list[tuple[str, str]]:
    model = trained.model
    heads = f"{model.num_attention_heads}, of {model.head_dim}" + (
        f"; {model.kv_heads} for keys and values" if model.num_query_groups else ""
    )
    return [
        (
            "kind",
            "Llama-like transformer without the causal mask: RMSNorm, RoPE, SwiGLU, no biases",
        ),
        (
            "parameters",
            (
                f"{num_parameters(model):,} ({num_parameters(model, embedding=False):,} without"
                f" embedding and head), {dtype}"
            ),
        ),
        (
            "layers, width, inner width",
            f"{model.num_layers}, {model.hidden_size}, {model.ffn_hidden_size}",
        ),
        ("attention heads", heads),
        (
            "rows of the vocabulary",
            f"{model.vocab_size:,}" + (", tied with the head" if model.tie_embeddings else ""),
        ),
        ("RoPE base, norm epsilon", f"{model.rope_theta:g}, {model.norm_eps:g}"),
        ("longest sequence of the training", f"{trained.longest:,} tokens"),
    ]


def _training(state: CheckpointState, averaged: list[int]) -> list[tuple[str, str]]:
    earlier = [entry for entry in state.lineage if "tokens" in entry]
    imported = [entry for entry in state.lineage if "imported" in entry]
    kinds = {"pretrain": "pretraining", "sft": "supervised fine-tuning"}
    rows = [
        ("objective", "masked diffusion (arXiv 2502.09992, Eq. 3)"),
        ("stage", kinds[state.config["task"]]),
    ]
    if imported:
        rows.append(("started from", f"the weights of an imported {imported[0]['architecture']}"))
    rows.append(("steps, tokens seen", f"{state.step:,}, {state.tokens:,}"))
    if earlier:
        rows.append(
            (
                "tokens seen before, in the runs it started from",
                f"{sum(entry['tokens'] for entry in earlier):,}",
            )
        )
    if averaged:
        rows.append(
            ("weights", f"mean of the checkpoints after steps {', '.join(map(str, averaged))}")
        )
    return rows


def _validation(line: dict[str, Any]) -> str:
    """NELBO of the held-out text, by corpus and in all, with standard errors."""

    def cells(values: dict[str, Any]) -> str:
        return " | ".join(with_error(values, key) for key in ("nelbo_per_token", "bits_per_byte"))

    rows = [f"| {name} | {cells(values)} |\n" for name, values in line["corpora"].items()]
    if len(rows) > 1:
        rows.append(f"| all, by weight | {cells(line)} |\n")
    note = (
        f"\nAfter step {line['step']:,}, on held-out text with fixed noise, ± the standard error"
        " over such text; an upper bound of the negative log likelihood.\n"
    )
    return (
        "| corpus | NELBO, nats per token | bits per byte |\n|---|---|---|\n" + "".join(rows) + note
    )
