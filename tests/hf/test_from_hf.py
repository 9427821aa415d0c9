"""`llada convert from-hf` and `run.init_from` of a folder: models that others wrote, in both
directions.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_inputs
from data_tools.readers.report import Report
from llada.checkpoint.format import read_state, resolve_checkpoint
from llada.config.sections import ModelSection
from llada.errors import RunError, UserError
from llada.hf.exporting import ExportOptions, to_hf
from llada.hf.folder import open_folder
from llada.hf.importing import ImportOptions, from_hf
from llada.hf.modeling_llada import LLaDAModelLM
from llada.tokenizer import MASK, Tokenizer
from tests.engine.support import OracleTrainer
from tests.hf.folders import SIZES, llama_folder, published_folder
from tests.model.oracle import Oracle
from tests.preparation import prepare
from tests.stand_ins import like
from tests.workplace import Workplace


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of a model that knows no masks: 500 ids, an EOS, no other special token."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("plain")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    texts = read_inputs([Path(sysconfig.get_paths()["stdlib"]) / "json"], ReadOptions(), Report())
    fast.train_from_iterator(texts, trainer)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def exported(
    checkpoint_folder: Path, out: Path, dtype: str | None = None
) -> dict[str, torch.Tensor]:
    to_hf(checkpoint_folder, out, ExportOptions(dtype=dtype, layout="llada"))
    return load_file(out / "model.safetensors")


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_comes_back_bit_for_bit(
    tied: bool, dtype: torch.dtype, name: str, files: int, workplace: Workplace, tmp_path: Path
) -> None:
    expected = published_folder(
        tmp_path / "folder", workplace.folder / "tokenizer", dtype, files, tie_embeddings=tied
    )
    from_hf(tmp_path / "folder", tmp_path / "checkpoint")
    tensors = exported(tmp_path / "checkpoint", tmp_path / "back", name)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensors[key].dtype == dtype
        assert torch.equal(tensors[key].view(torch.uint8), tensor.view(torch.uint8)), key
    before, after = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("folder", "back")
    )
    sizes = (
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "mlp_hidden_size",
        "vocab_size",
        "embedding_size",
        "rope_theta",
        "rms_norm_eps",
    )
    for field in (*sizes, "weight_tying", "max_sequence_length", "mask_token_id", "eos_token_id"):
        assert after[field] == before[field], field


def test_the_same_folder_gives_the_same_bytes(workplace: Workplace, tmp_path: Path) -> None:
    published_folder(tmp_path / "folder", workplace.folder / "tokenizer", files=2)
    for name in ("one", "two"):
        from_hf(tmp_path / "folder", tmp_path / name)
        to_hf(tmp_path / name, tmp_path / f"{name}-hf", ExportOptions(max_shard_size="64KiB"))
    for suffix in ("", "-hf"):
        files = [
            path.relative_to(tmp_path / f"one{suffix}")
            for path in (tmp_path / f"one{suffix}").rglob("*")
            if path.is_file()
        ]
        assert len(files) > 6
        for file in files:
            assert (tmp_path / f"one{suffix}" / file).read_bytes() == (
                tmp_path / f"two{suffix}" / file
            ).read_bytes(), file


def test_pickled_weights_are_read_only_with_leave(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    expected = published_folder(folder, workplace.folder / "tokenizer", torch.bfloat16)
    (folder / "model.safetensors").unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"as pickles .*`llada convert from-hf --allow-pickle`"):
        from_hf(folder, tmp_path / "checkpoint")
    from_hf(folder, tmp_path / "checkpoint", ImportOptions(allow_pickle=True))
    tensors = exported(tmp_path / "checkpoint", tmp_path / "back")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_a_pickle_that_runs_code_is_refused_with_leave_too(
    workplace: Workplace, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "owned",)

    folder = tmp_path / "folder"
    published_folder(folder, workplace.folder / "tokenizer")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot be read as weights"):
        from_hf(folder, tmp_path / "checkpoint", ImportOptions(allow_pickle=True))
    assert not (tmp_path / "owned").exists()


# -- it is the same model --------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_an_independent_implementation_import_and_train_on(
    tied: bool, workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle's weights in the published layout: a run that starts from the folder, and one from
    its import, have the oracle's losses and gradient norms over three steps, and the two are equal
    to the last digit.
    """
    from llada.data.tasks import open_data
    from llada.training.configure import load_config

    tensors = published_folder(
        tmp_path / "folder", workplace.folder / "tokenizer", tie_embeddings=tied
    )
    from_hf(tmp_path / "folder", tmp_path / "checkpoint")
    model = {**SIZES, "tie_embeddings": tied}
    runs = []
    for number, source in enumerate(("folder", "checkpoint")):
        run = f"independent{number}-{tied}"
        name = workplace.config(
            f"{run}.yaml",
            model=model,
            train={"steps": 3},
            run={"dir": run, "threads": 2, "init_from": str(tmp_path / source)},
        )
        workplace.run("pretrain", name)
        runs.append([line for line in workplace.lines(run) if "loss" in line])
    assert runs[0] == runs[1] and len(runs[0]) == 3
    monkeypatch.chdir(workplace.folder)
    config = load_config(name)
    data, trainer = open_data(config, verify=False), OracleTrainer(config, tensors)
    for step, line in enumerate(runs[0]):
        plan = data.plan(step)
        batches = [data.batch(plan, range(first, first + 4)) for first in (0, 4)]
        loss, norm, _ = trainer.step(batches, line["lr"])
        assert (line["loss"], line["grad_norm"]) == pytest.approx((loss, norm), rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "rope_theta": 5e5}],
    ids=str,
)
def test_a_llama_is_the_same_function_under_a_causal_mask(
    fields: dict[str, Any], plain_tokenizer: Path, tmp_path: Path
) -> None:
    """transformers' Llama, imported with a mask token and exported as LLaDA, given a causal mask,
    has Llama's logits.
    """
    llama = llama_folder(tmp_path / "llama", plain_tokenizer, **fields)
    output = from_hf(
        tmp_path / "llama", tmp_path / "checkpoint", ImportOptions(add_mask_token=True)
    )
    assert f"1 new tokens ({MASK} 500), rows 500 -> 512, 11 of them padding" in output
    to_hf(tmp_path / "checkpoint", tmp_path / "out", ExportOptions(layout="llada"))
    ours = LLaDAModelLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(1))
    causal = torch.ones(24, 24, dtype=torch.bool).tril().expand(2, 1, 24, 24)
    with torch.no_grad():
        expected = llama(ids).logits
        logits = ours(ids, attention_mask=causal).logits
    assert logits.shape[-1] == 512
    assert (logits[..., :500] - expected).abs().max() <= 1e-5 * expected.abs().max()
    rows = llama.get_input_embeddings().weight.detach()
    assert torch.allclose(
        ours.get_input_embeddings().weight[500:],
        rows.double().mean(0).float().expand(12, -1),
        atol=1e-7,
    )
    head = llama.get_output_embeddings().weight.detach()
    assert torch.allclose(
        ours.get_output_embeddings().weight[500:],
        head.double().mean(0).float().expand(12, -1),
        atol=1e-7,
    )
    assert torch.equal(ours.get_input_embeddings().weight[:500], rows)


def test_a_diffusion_model_starts_from_a_llama(
    plain_tokenizer: Path, workplace: Workplace, tmp_path: Path
) -> None:
    """From the folder of an autoregressive model to a run: what the messages say is enough."""
    llama_folder(tmp_path / "llama", plain_tokenizer)
    with pytest.raises(UserError, match=r"no mask token.*--add-mask-token gives it one"):
        from_hf(tmp_path / "llama", tmp_path / "checkpoint")
    from_hf(tmp_path / "llama", tmp_path / "checkpoint", ImportOptions(add_mask_token=True))
    library = Path(sysconfig.get_paths()["stdlib"])
    prepare(
        [library / "json"],
        tmp_path / "checkpoint" / "tokenizer",
        tmp_path / "corpus",
        validation_fraction=0.15,
    )
    model = {**SIZES, "norm_eps": 1e-6, "rope_theta": 10000.0}
    settings = {
        "model": model,
        "train": {"steps": 2},
        "data": {"sequence_length": 64, "mixture": [{"path": str(tmp_path / "corpus")}]},
    }
    name = workplace.config(
        "llama.yaml",
        run={"dir": "llama", "threads": 2, "init_from": str(tmp_path / "checkpoint")},
        **settings,
    )
    workplace.run("pretrain", name)
    state = read_state(resolve_checkpoint(workplace.folder / "llama"))
    assert [entry.get("architecture") for entry in state.lineage] == ["LlamaForCausalLM", None]
    assert state.lineage[0]["vocabulary"].startswith(f"vocabulary: 1 new tokens ({MASK} 500)")
    folder = workplace.config(
        "folder.yaml",
        run={"dir": "llama2", "threads": 2, "init_from": str(tmp_path / "llama")},
        **settings,
    )
    done = workplace.run("pretrain", folder, code=2)
    assert (
        "has no mask token; `llada convert from-hf" in done.stderr
        and "--add-mask-token" in done.stderr
    )
    moments = workplace.config(
        "moments.yaml",
        run={
            "dir": "m",
            "threads": 2,
            "init_from": str(tmp_path / "checkpoint"),
            "init_what": "weights+optimizer",
        },
        **settings,
    )
    assert (
        "is an imported checkpoint, which contains only weights"
        in workplace.run("pretrain", moments, code=2).stderr
    )


def test_the_model_section_of_a_run_is_printed(plain_tokenizer: Path, tmp_path: Path) -> None:
    """With the folder's own rotary base and norm epsilon, which a config that leaves them to the
    defaults would change.
    """
    llama_folder(tmp_path / "llama", plain_tokenizer, vocab_size=520)
    output = from_hf(
        tmp_path / "llama", tmp_path / "checkpoint", ImportOptions(add_mask_token=True)
    )
    printed = yaml.safe_load(output[output.index("\nmodel:\n") :])
    assert ModelSection.model_validate(printed["model"]) == open_folder(tmp_path / "llama").model
    assert (printed["model"]["rope_theta"], printed["model"]["norm_eps"]) == (10000.0, 1e-6)


def test_new_tokens_take_rows_that_are_there_and_others_keep_theirs(
    plain_tokenizer: Path, tmp_path: Path
) -> None:
    llama = llama_folder(tmp_path / "llama", plain_tokenizer, vocab_size=520)
    output = from_hf(
        tmp_path / "llama", tmp_path / "checkpoint", ImportOptions(add_special_tokens=True)
    )
    tokenizer = Tokenizer.load(tmp_path / "checkpoint" / "tokenizer")
    assert tokenizer.vocab_size == 506 and tokenizer.token(tokenizer.eos_id) == "</s>"
    assert "6 new tokens" in output and "in 520 rows that were there" in output
    tensors = exported(tmp_path / "checkpoint", tmp_path / "out")
    rows = llama.get_output_embeddings().weight.detach()
    head = tensors["model.transformer.ff_out.weight"]
    assert torch.equal(head[:500], rows[:500]) and torch.equal(head[506:], rows[506:])
    assert torch.allclose(
        head[500:506], rows[:500].double().mean(0).float().expand(6, -1), atol=1e-7
    )


def test_an_import_can_be_sampled_from_and_verified(workplace: Workplace, tmp_path: Path) -> None:
    published_folder(tmp_path / "folder", workplace.folder / "tokenizer")
    workplace.run("convert", "from-hf", str(tmp_path / "folder"), str(tmp_path / "checkpoint"))
    output = workplace.run(
        "convert", "to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "back"), "--verify"
    ).stdout
    assert "the same best token at 512 of 512 positions" in output
    texts = [
        workplace.run("sample", str(tmp_path / name), "def ", "--length", "8").stdout
        for name in ("checkpoint", "back")
    ]
    assert texts[0] == texts[1]


def test_the_oracle_itself_agrees_with_the_import(workplace: Workplace, tmp_path: Path) -> None:
    tensors = published_folder(tmp_path / "folder", workplace.folder / "tokenizer")
    from_hf(tmp_path / "folder", tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    ids = torch.randint(0, 512, (2, 16))
    expected = Oracle(ModelSection(**SIZES), tensors)(ids, torch.zeros_like(ids))
    logits = LLaDAModelLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


# -- what is refused -------------------------------------------------------------------------------


def change(**fields: Any) -> Callable[[Path], None]:
    """Other fields in config.json; None takes one away."""

    def work(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **fields}
        (folder / "config.json").write_text(
            json.dumps({name: value for name, value in config.items() if value != "gone"})
        )

    return work


def retensor(work: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change_file(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        work(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change_file


def take_two(tensors: dict[str, torch.Tensor]) -> None:
    del (
        tensors["model.transformer.ln_f.weight"],
        tensors["model.transformer.blocks.1.q_proj.weight"],
    )
    tensors["model.transformer.wpe.weight"] = torch.zeros(2, 2)
    tensors["model.transformer.blocks.0.k_proj.weight"] = torch.zeros(64, 64)


def index(**files: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
        names |= {f"model.transformer.{name}.weight": file for name, file in files.items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return work


def cut(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count]) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            r"is not a Hugging Face folder \(no config.json\)",
        ),
        (cut("config.json", 30), "config.json: not JSON"),
        (
            change(model_type="qwen2"),
            r"model_type 'qwen2' is not read; one of llada, llama, mistral",
        ),
        (change(model_type="lada"), r"did you mean 'llada'"),
        (
            change(architectures=["LLaDAMoEModelLM"]),
            r"architectures \['LLaDAMoEModelLM'\] is not read",
        ),
        (
            change(pruned_heads={"0": [1]}),
            r"not computed here: pruned_heads \{'0': \[1\]\} \(only \{\}\)",
        ),
        (change(is_decoder=True), r"is_decoder True \(only False\)"),
        (change(n_layers=9000), r"it has 9000 layers, and there are 21 tensors"),
        (
            lambda folder: (folder / "config.json").write_text("[" * 5000 + "]" * 5000),
            "config.json: not JSON",
        ),
        (
            change(rope_scaling={"type": "linear", "factor": 4.0}),
            r"not known here, so not computed: rope_scaling",
        ),
        (change(n_heads=0), "n_heads: 0 is not a positive integer"),
        (change(n_kv_heads=0), "n_kv_heads: 0 is not a positive integer"),
        (change(max_sequence_length="x"), "max_sequence_length: 'x' is not a positive integer"),
        (change(rope_theta="x"), "rope_theta: 'x' is not a positive number"),
        (
            change(rope_theta="gone", weight_tying="gone"),
            r"missing rope_theta, weight_tying; without it the file describes another model",
        ),
        (change(alibi=True), r"does not compute alibi=True \(only False\)"),
        (change(include_bias=True), r"include_bias=True"),
        (change(quantization_config={"bits": 4}), r"quantization_config"),
        (change(mask_token_id=3), r"mask_token_id 3 is not the tokenizer's mask token"),
        (change(n_heads=5), "n_heads=5"),
        (change(d_model="64"), "d_model: '64' is not a positive integer"),
        (
            retensor(take_two),
            r"missing: model.transformer.blocks.1.q_proj.weight, model.transformer.ln_f.weight;"
            r" unexpected: model.transformer.wpe.weight; "
            r"misshapen: model.transformer.blocks.0.k_proj.weight is \[64, 64\], not \[32, 64\]",
        ),
        (
            retensor(
                lambda t: t.update(
                    {"model.transformer.ln_f.weight": torch.ones(64, dtype=torch.int8)}
                )
            ),
            "has dtype I8",
        ),
        (cut("model.safetensors", 5000), "model.safetensors: not a sound safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (
            index(wte="elsewhere.safetensors"),
            r"names files that are not there: elsewhere.safetensors",
        ),
        (
            index(wte="../model.safetensors"),
            r"'../model.safetensors' is not a file name in this folder",
        ),
        (index(wte="/etc/passwd"), r"'/etc/passwd' is not a file name in this folder"),
        (index(wpe="model.safetensors"), r"not in their files: model.transformer.wpe.weight"),
        (cut("tokenizer.json", 50), "tokenizer.json: not JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer in this folder"),
    ],
)
def test_folders_that_are_refused(
    damage: Callable[[Path], None], message: str, workplace: Workplace, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    published_folder(folder, workplace.folder / "tokenizer")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        from_hf(folder, tmp_path / "deep" / "checkpoint")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"rope_type 'llama3' \(only 'default'\)",
        ),
        ({"attention_bias": True}, r"attention_bias True \(only False\)"),
        ({"head_dim": 32}, r"head_dim x num_attention_heads 128 \(only 64\)"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' \(only 'silu'\)"),
        ({"num_hidden_layers": "gone"}, "missing num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0 is not a positive integer"),
        ({"num_attention_heads": "four"}, "num_attention_heads: 'four' is not a positive integer"),
        ({"max_position_embeddings": None}, "missing max_position_embeddings"),
        ({"rope_theta": "x"}, "rope_theta: 'x' is not a positive number"),
        ({"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM' is not read"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
            r"sliding_window 4096 \(only None\)",
        ),
    ],
)
def test_llamas_that_are_refused(
    fields: dict[str, Any], message: str, plain_tokenizer: Path, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "llama", plain_tokenizer)
    change(rope_parameters="gone", **fields)(tmp_path / "llama")
    with pytest.raises(UserError, match=message):
        from_hf(tmp_path / "llama", tmp_path / "checkpoint", ImportOptions(add_mask_token=True))


DEFAULTS_OF_4_46 = {
    **{
        "return_dict": True,
        "output_hidden_states": False,
        "output_attentions": False,
        "torchscript": False,
        "use_bfloat16": False,
    },
    **{
        "tf_legacy_loss": False,
        "pruned_heads": {},
        "tie_word_embeddings": True,
        "chunk_size_feed_forward": 0,
        "is_decoder": False,
    },
    **{
        "is_encoder_decoder": False,
        "cross_attention_hidden_size": None,
        "add_cross_attention": False,
        "tie_encoder_decoder": False,
    },
    **{
        "max_length": 20,
        "min_length": 0,
        "do_sample": False,
        "early_stopping": False,
        "num_beams": 1,
        "num_beam_groups": 1,
    },
    **{
        "diversity_penalty": 0.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
    },
    **{
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_no_repeat_ngram_size": 0,
        "bad_words_ids": None,
    },
    **{
        "num_return_sequences": 1,
        "output_scores": False,
        "return_dict_in_generate": False,
        "forced_bos_token_id": None,
    },
    **{
        "forced_eos_token_id": None,
        "remove_invalid_values": False,
        "exponential_decay_length_penalty": None,
        "suppress_tokens": None,
    },
    **{
        "begin_suppress_tokens": None,
        "finetuning_task": None,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    },
    **{
        "tokenizer_class": None,
        "prefix": None,
        "sep_token_id": None,
        "decoder_start_token_id": None,
        "task_specific_params": None,
    },
    **{"problem_type": None, "_attn_implementation_autoset": False},
}
"""What `PretrainedConfig().to_dict()` gives in transformers 4.46.3, less ids, names and dtype."""


def test_a_config_written_in_full_is_read(workplace: Workplace, tmp_path: Path) -> None:
    published_folder(tmp_path / "folder", workplace.folder / "tokenizer")
    own = json.loads((tmp_path / "folder" / "config.json").read_text())
    for fields in (
        DEFAULTS_OF_4_46,
        PretrainedConfig().to_dict(),
        {"temperature": 0.7, "max_length": 4096},
    ):
        (tmp_path / "folder" / "config.json").write_text(json.dumps({**fields, **own}))
        assert open_folder(tmp_path / "folder").model.num_layers == 2


def test_a_run_refuses_a_folder_whose_config_names_another_mask(
    workplace: Workplace, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    published_folder(folder, workplace.folder / "tokenizer")
    change(mask_token_id=3)(folder)
    name = workplace.config(
        "mask.yaml", model=SIZES, run={"dir": "mask", "threads": 2, "init_from": str(folder)}
    )
    assert (
        "mask_token_id 3 is not the tokenizer's mask token"
        in workplace.run("pretrain", name, code=2).stderr
    )
    assert not (workplace.folder / "mask").exists()


def test_an_output_inside_what_is_read_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    published_folder(tmp_path / "folder", workplace.folder / "tokenizer")
    with pytest.raises(UserError, match=r"OUT: .* lies inside .*folder"):
        from_hf(tmp_path / "folder", tmp_path / "folder" / "checkpoint")
    from_hf(tmp_path / "folder", tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"OUT: .* lies inside .*checkpoint"):
        to_hf(tmp_path / "checkpoint", tmp_path / "checkpoint" / "model" / "hf")


def test_a_tied_folder_may_hold_the_head_once_more_if_it_is_the_same(
    workplace: Workplace, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    tensors = published_folder(folder, workplace.folder / "tokenizer", tie_embeddings=True)
    head = tensors["model.transformer.wte.weight"].clone()
    save_file({**tensors, "model.transformer.ff_out.weight": head}, folder / "model.safetensors")
    from_hf(folder, tmp_path / "checkpoint")
    assert exported(tmp_path / "checkpoint", tmp_path / "out").keys() == tensors.keys()
    head[3, 3] += 1
    save_file({**tensors, "model.transformer.ff_out.weight": head}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected: model.transformer.ff_out.weight"):
        from_hf(folder, tmp_path / "other")


def test_the_disk_is_asked_first(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published_folder(tmp_path / "folder", workplace.folder / "tokenizer")
    from_hf(tmp_path / "folder", tmp_path / "checkpoint")
    usage = type("Usage", (), {"free": 1000, "total": 2000})
    monkeypatch.setattr("llada.outputs.shutil", like(shutil, disk_usage=lambda path: usage))
    for work in (from_hf, to_hf):
        source = tmp_path / ("folder" if work is from_hf else "checkpoint")
        with pytest.raises(UserError, match=r"OUT: '.*' needs [\d.]+ [kM]B, and .* has 1 kB left"):
            work(source, tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "folder"]


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("fp16", 1e6, "1e\\+06, which float16 cannot hold"),
        ("fp32", float("nan"), "nan: these are the weights of a failed run"),
    ],
)
def test_weights_that_a_dtype_cannot_hold_are_not_written(
    dtype: str, value: float, message: str, workplace: Workplace, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    tensors = published_folder(folder, workplace.folder / "tokenizer")
    tensors["model.transformer.blocks.1.ff_out.weight"][5, 7] = value
    save_file(tensors, folder / "model.safetensors")
    from_hf(folder, tmp_path / "checkpoint")
    with pytest.raises(
        RunError, match=rf"model.transformer.blocks.1.ff_out.weight holds {message}"
    ):
        to_hf(tmp_path / "checkpoint", tmp_path / "out", ExportOptions(dtype=dtype))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "FOLDER: 'nowhere' is not a Hugging Face folder"),
        (["whole", "out"], "FOLDER: 'whole' is not a Hugging Face folder"),
        (["folder", "corpus"], "OUT: 'corpus' exists; --force replaces a checkpoint"),
        (["folder", "corpus", "--force"], "OUT: 'corpus' is not a checkpoint"),
        (["folder", "out", "--dtype", "fp16"], "--dtype: 'fp16' is not allowed; one of fp32, bf16"),
        (["folder", "out", "--tokenizer", "nowhere"], "nowhere: no such tokenizer"),
    ],
)
def test_refusals_of_the_command(arguments: list[str], message: str, workplace: Workplace) -> None:
    if not (workplace.folder / "folder").exists():
        published_folder(workplace.folder / "folder", workplace.folder / "tokenizer")
    done = workplace.run("convert", "from-hf", *arguments, code=2)
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not (workplace.folder / "out").exists()
