"""`llada sample` and `llada infill` on an exported folder and on a training checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llada.checkpoint.format import resolve_checkpoint
from llada.cli import app
from llada.errors import RunError, UserError
from llada.hf.exporting import ExportOptions, to_hf
from llada.sampling import commands
from llada.sampling.diffusion import SamplingOptions
from llada.sampling.infilling import parse
from llada.sampling.loading import load
from llada.sampling.playback import Playback
from llada.tokenizer import Tokenizer
from tests.hf.folders import llama_folder
from tests.workplace import Workplace


@pytest.fixture(scope="module")
def export(workplace: Workplace) -> Path:
    folder = workplace.folder / "sampled_export"
    to_hf(workplace.folder / "whole", folder)
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, UserError), result.output + repr(result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_a_checkpoint_and_its_export_write_the_same(workplace: Workplace, export: Path) -> None:
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    ours, theirs = load(workplace.folder / "whole"), load(export)
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=0, atol=1e-6)
    assert ours.special_ids == theirs.special_ids
    for words in (
        ["sample", "{}", "def f(", "--length", "8"],
        ["sample", "{}", "what?", "--chat", "--length", "6", "--temperature", "1"],
    ):
        first, second = (
            run(*(word.replace("{}", str(model)) for word in words))
            for model in (workplace.folder / "whole", export)
        )
        assert first == second
    assert run("infill", workplace.folder / "whole", "a [MASK*3] b") == run(
        "infill", export, "a [MASK*3] b"
    )


def test_every_step_is_shown(export: Path) -> None:
    out = run("sample", export, "import ", "--length", "6", "--steps", "3", "--show").splitlines()
    assert [line.split(":")[0] for line in out[:3]] == ["step 1/3", "step 2/3", "step 3/3"]
    assert out[0].count("▒") == 4
    assert out[2].count("▒") == 0


def test_the_text_around_a_gap_stays(export: Path) -> None:
    out = run("infill", export, "x = [MASK*4]\ny = [MASK]")
    assert out.startswith("x = ")
    assert "\ny = " in out


def test_special_tokens_are_not_printed(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(export)
    eos, yes = model.special_ids.eos_id, model.tokenizer.encode("y").tolist()[0]

    def forced(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 512)
        logits[:, ::2, eos] = logits[:, 1::2, yes] = 9.0
        return logits

    monkeypatch.setattr(type(model), "__call__", forced)
    assert commands.fill_gaps(model, "[MASK*4]", SamplingOptions(steps=1)) == "yy"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    ],
)
def test_a_text_that_does_not_fit_into_memory(
    error: Exception, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        raise error

    model = load(export)
    monkeypatch.setattr(type(model), "__call__", fail)
    with pytest.raises(
        UserError, match="a text of 5 tokens does not fit into the memory of cpu; shorten it"
    ):
        commands.write(model, "", False, SamplingOptions(5, 5))


def test_a_prompt_from_stdin(export: Path) -> None:
    result = CliRunner().invoke(
        app, ["sample", str(export), "-", "--length", "4"], input="import os"
    )
    assert result.stdout == run("sample", export, "import os", "--length", "4")


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|eot_id|>"])
def test_an_answer_ends_at_eos_or_at_the_end_of_its_turn(
    end: str, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(export)
    expected = [
        *model.tokenizer.encode("yes").tolist(),
        model.tokenizer.id_of(end),
        *model.tokenizer.encode("no").tolist(),
    ]

    def forced(tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens.shape, 512)
        for i, token_id in enumerate(expected):
            logits[:, tokens.shape[1] - len(expected) + i, token_id] = 9.0
        return logits

    monkeypatch.setattr(type(model), "__call__", lambda self, tokens: forced(tokens))
    assert commands.write(model, "well?", True, SamplingOptions(len(expected), 1)) == ("yes", True)
    expected.remove(model.tokenizer.id_of(end))
    assert commands.write(model, "well?", True, SamplingOptions(len(expected), 1)) == (
        "yesno",
        False,
    )


def test_a_question_is_put_into_the_models_own_chat_template(
    workplace: Workplace, tmp_path: Path
) -> None:
    """A checkpoint carries the template with its tokenizer; its export has it in place
    of LLaDA's.
    """
    from transformers import AutoTokenizer

    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}<|eot_id|>{% endfor %}{{"
        " 'assistant:' if add_generation_prompt }}"
    )
    run_folder = tmp_path / "run"
    shutil.copytree(workplace.folder / "whole", run_folder)
    source = resolve_checkpoint(run_folder)
    tokenizer = Tokenizer.load(source / "tokenizer")
    tokenizer.chat_template = template
    tokenizer.save(source / "tokenizer")
    assert "own chat template" in to_hf(source, tmp_path / "export", ExportOptions(checksums=False))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.chat_template == template
    question = " what? "
    text = theirs.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    assert text == "user: what?<|eot_id|>assistant:"
    for model in (load(source), load(tmp_path / "export")):
        seen: list[list[int]] = []
        real = type(model).__call__

        def spy(
            self: Any, tokens: torch.Tensor, seen: list[list[int]] = seen, real: Any = real
        ) -> torch.Tensor:
            seen.append(tokens[0].tolist())
            return real(self, tokens)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "__call__", spy)
            commands.write(model, question, True, SamplingOptions(4, 1))
        prompt = theirs(text, add_special_tokens=False)["input_ids"]
        assert seen[0] == [*prompt, *[model.special_ids.mask_id] * 4]
    (tmp_path / "export" / "chat_template.jinja").write_text(
        "{{ raise_exception('closed today') }}"
    )
    assert "closed today" in refusal(
        "sample", tmp_path / "export", "what?", "--chat", "--length", "2"
    )


def test_gaps(export: Path) -> None:
    tokenizer = Tokenizer.load(export)
    gapped = parse("ab[MASK] c[MASK*3]", tokenizer)
    ab, c = tokenizer.encode("ab").tolist(), tokenizer.encode(" c").tolist()
    mask = tokenizer.mask_id
    assert gapped.tokens.tolist() == [[*ab, mask, *c, mask, mask, mask]]
    assert gapped.spans == ((len(ab), len(ab) + 1), (len(ab) + 1 + len(c), len(ab) + 4 + len(c)))
    literal = parse("<|mdm_mask|>[MASK]", tokenizer)
    assert (literal.tokens == mask).sum() == 1, "text cannot spell a mask"


def test_playback_shows_hidden_new_and_old(export: Path) -> None:
    tokenizer = Tokenizer.load(export)
    a, b = tokenizer.encode("a").tolist()[0], tokenizer.encode("b").tolist()[0]
    playback = Playback(tokenizer, tokenizer.mask_id, first=1)
    runs = playback.styled_runs(
        torch.tensor([b, a, b, tokenizer.mask_id]), torch.tensor([False, False, True, False])
    )
    assert runs == [("a", ""), ("b", "bold green"), ("▒", "dim")]


def changed(export: Path, target: Path, name: str, change: Any) -> Path:
    shutil.copytree(export, target)
    change(target / name)
    return target


def without_mask(path: Path) -> None:
    """A tokenizer in whose files no token has the mask's name."""
    for file in path.parent.glob("*token*.json"):
        file.write_text(
            file.read_text()
            .replace("<|mdm_mask|>", "<|other|>")
            .replace('"mask_token"', '"other_token"')
        )


def field(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", Path.unlink, "has no weights (model.safetensors"),
        ("tokenizer.json", without_mask, "the tokenizer has no mask token"),
        ("tokenizer.json", Path.unlink, "no tokenizer in this folder"),
        (
            "config.json",
            field(mask_token_id=7),
            "config.json: mask_token_id 7 is not the tokenizer's mask token",
        ),
        (
            "model.safetensors",
            lambda path: path.write_bytes(path.read_bytes()[:1000]),
            "not a sound safetensors file",
        ),
        ("config.json", field(n_layers=8), "missing: model.transformer.blocks.2.attn_norm.weight"),
        (
            "config.json",
            field(n_layers=1),
            "unexpected: model.transformer.blocks.1.attn_norm.weight",
        ),
        (
            "config.json",
            field(mlp_hidden_size=96),
            "blocks.0.ff_proj.weight is [128, 64], not [96, 64]",
        ),
        (
            "config.json",
            field(model_type="llama", architectures=["LlamaForCausalLM"]),
            "missing hidden_size",
        ),
    ],
)
def test_folders_that_cannot_be_used(
    name: str, change: Any, message: str, export: Path, tmp_path: Path
) -> None:
    folder = changed(export, tmp_path / "broken", name, change)
    assert message in refusal("sample", folder, "x", "--length", "2")
    assert message in refusal("infill", folder, "[MASK]")


def test_weights_that_are_not_finite(export: Path, tmp_path: Path) -> None:
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        tensors["model.transformer.blocks.0.ff_out.weight"][0, 0] = float("nan")
        save_file(tensors, path, {"format": "pt"})

    folder = changed(export, tmp_path / "spoiled", "model.safetensors", spoil)
    for words in (("sample", folder, "x", "--length", "2"), ("infill", folder, "[MASK]")):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert isinstance(result.exception, RunError), result.output
        assert "logits are not finite" in str(result.exception)


def test_a_llama_writes_from_left_to_right_and_fills_no_gaps(
    workplace: Workplace, tmp_path: Path
) -> None:
    folder = tmp_path / "llama"
    llama_folder(folder, workplace.folder / "tokenizer", vocab_size=512)
    words = ("sample", folder, "x", "--length", "8", "--seed", "1")
    assert run(*words) == run(*words)
    assert "cannot fill masks" in refusal("infill", folder, "x [MASK]")


def test_code_in_a_folder_is_not_run(export: Path, tmp_path: Path) -> None:
    folder = changed(
        export,
        tmp_path / "evil",
        "modeling_llada.py",
        lambda path: path.write_text("raise SystemExit('owned')"),
    )
    assert run("sample", folder, "x", "--length", "2") == run(
        "sample", export, "x", "--length", "2"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "MODEL: no folder 'nowhere'"),
        (["sample", "{corpus}"], "is neither an exported folder"),
        (["sample", "{export}", "x", "--remasking", "high"], "--remasking: 'high' is not allowed"),
        (
            ["sample", "{export}", "x", "--length", str(10**12)],
            "--length: 1000000000000 is more than 100000",
        ),
        (
            ["sample", "{export}", "x", "--length", "8", "--steps", str(10**12)],
            "--steps: 1000000000000 is more than 100000",
        ),
        (["sample", "a" * 5000, "x"], "MODEL: no folder 'aaa"),
        (["infill", "{export}", f"[MASK*{'9' * 5000}]"], "allowed are 1 to 100000"),
        (["sample", "{export}", "ab\udcff"], "PROMPT: not UTF-8 at character 3"),
        (["infill", "{export}", "no gap"], "TEXT: no gap; write [MASK]"),
        (["infill", "{export}", "a [MASK*0] b"], "is a gap of 0 tokens"),
        (["infill", "{export}", "a [mask] b"], "TEXT: no gap; write [MASK]"),
        (["infill", "{export}", "a [MASK] [MASK 8] b"], "'[MASK 8]' is not a gap"),
        (["infill", "{export}", "[MASK]", "--steps", "0"], "--steps: 0 is less than 1"),
    ],
)
def test_refusals(arguments: list[str], message: str, workplace: Workplace, export: Path) -> None:
    words = [
        (
            word.format(export=export, corpus=workplace.folder / "corpus")
            if word.startswith("{")
            else word
        )
        for word in arguments
    ]
    assert message in refusal(*words)


def test_exit_2_and_one_line(workplace: Workplace) -> None:
    done = workplace.run("sample", "nowhere", code=2)
    assert done.stderr == "error: MODEL: no folder 'nowhere'\n"
