"""Config: strict keys, clear refusals, round trips, and docs that list every setting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from docs.settings import PAGES, settings, settings_table, with_table
from llada.config import RunConfig, build_config, dump_config, read_yaml, to_yaml
from llada.config.sections import OptimizerSection
from llada.errors import UserError
from llada.training.configure import load_config
from llada.training.schedule import Schedule

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
DEMO = ROOT / "configs" / "demo" / "pretrain.yaml"


def test_every_setting_is_documented() -> None:
    """`make docs` writes the tables."""
    for page, section in PAGES.items():
        undescribed = [name for name, field in settings(section) if not field.description]
        assert not undescribed
        assert settings_table(section) in (ROOT / "docs" / page).read_text()


def test_the_tables_are_replaced_and_nothing_else() -> None:
    page = "before\n\n| Setting | Default | Meaning |\n|---|---|---|\n| `old` | 1 | x |\n\nafter\n"
    text = with_table(page, OptimizerSection)
    assert text == f"before\n\n{settings_table(OptimizerSection)}\nafter\n"
    with pytest.raises(ValueError, match="0 tables"):
        with_table("no table\n", OptimizerSection)


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "configs").glob("*/*.yaml")) - set(CLUSTERS)),
    ids=lambda p: p.parent.name,
)
def test_shipped_configs(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    schedule = Schedule(config.schedule, config.tokens_per_step)
    assert schedule.steps is None or schedule.steps >= config.train.steps
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_the_published_numbers() -> None:
    large = load_config(ROOT / "configs" / "llada_8b" / "pretrain.yaml")
    assert (
        large.batch.global_,
        large.data.sequence_length,
        large.optimizer.weight_decay,
        large.objective.eps,
    ) == (1280, 4096, 0.1, 1e-3)
    schedule = Schedule(large.schedule, large.tokens_per_step)
    assert schedule.steps == large.train.steps
    assert large.train.steps * large.tokens_per_step == pytest.approx(2.3e12, rel=1e-5)
    with pytest.raises(
        UserError, match=r"parallel.tensor: 4 does not divide model.ffn_hidden_size = 5634"
    ):
        load_config(ROOT / "configs" / "llada_1b" / "pretrain.yaml", ["parallel.tensor=4"])


def test_overrides() -> None:
    config = load_config(
        DEMO,
        [
            "train.steps=7",
            "data.mixture.0.path=x",
            "run.init_from=null",
            "optimizer.beta2=0.9",
            "batch.global=32",
        ],
    )
    assert (
        config.train.steps,
        config.data.mixture[0].path,
        config.run.init_from,
        config.optimizer.beta2,
    ) == (7, "x", None, 0.9)
    assert (
        load_config(DEMO, ["data.mixture=[{path: a, weight: 2}, {path: b}]"]).data.mixture[0].weight
        == 2
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", "train.stps: unknown setting (did you mean 'train.steps'?)"),
        ("batch.globl=3", "did you mean 'batch.global'?"),
        ("modl.num_layers=3", "modl: unknown setting (did you mean 'model'?)"),
        (
            "data.mixture.0.pth=x",
            "data.mixture.0.pth: unknown setting (did you mean 'data.mixture.0.path'?)",
        ),
        ("data.mixture.5.path=x", "'5' is not an index of this list of 1"),
        ("train.steps=many", "train.steps: 'many' is not allowed"),
        ("train.steps=1.5", "train.steps: 1.5 is not allowed"),
        (
            "train.steps=0",
            "train.steps: 0 is not allowed: input should be greater than or equal to 1",
        ),
        ("objective.masking=bernouli", "(did you mean 'bernoulli'?)"),
        ("engine=deepspeed", "engine: 'deepspeed' is not allowed"),
        ("optimizer.eps=.nan", "optimizer.eps: nan is not allowed"),
        ("batch.micro=3", "batch.global: "),
        ("model.num_attention_heads=5", "model.hidden_size: "),
        (
            "model.num_query_groups=3",
            "model.num_query_groups: 3 does not divide num_attention_heads",
        ),
        ("parallel.tensor=3", "parallel.tensor: 3 does not divide"),
        ("parallel.pipeline=3", "parallel.pipeline: 3 does not divide model.num_layers"),
        ("parallel.sequence=true", "parallel.sequence: true needs parallel.tensor > 1"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline: 2 needs parallel.pipeline > 1"),
        ("parallel.context=3", "data.sequence_length: "),
        ("schedule.stages.0.end=null", "schedule.stages.0.end: missing"),
        ("validation.windows=10", "validation.windows: 10 is not allowed"),
        ("model.hidden_size=1000000000000", "model.hidden_size: 1000000000000 is not allowed"),
        (
            "model.num_layers=1000000000",
            (
                "model.num_layers: 1000000000 is not allowed: input should be less than or equal to"
                " 10000"
            ),
        ),
        ("batch.global=1000000000000000000", "batch.global: 1000000000000000000 is not allowed"),
        (
            "data.sequence_length=1000000000000",
            "data.sequence_length: 1000000000000 is not allowed",
        ),
        ("train.steps=" + "9" * 30, "train.steps: "),
        (
            "train.steps=" + "9" * 5000,
            "a number of 5,000 characters; no setting takes one of more than 100",
        ),
        (
            "seed=1_000",
            "1_000 is a number to some YAML readers and text to others; write it without _, or"
            " '1_000' in quotes",
        ),
        ("seed=010", "override 'seed=010': 010 is an octal number to some YAML readers"),
        ("seed=0b11", "0b11 is a binary number to some YAML readers"),
        ("seed=1:30", "1:30 is a number in base 60"),
        (
            "run.dir=no",
            "no is false to some YAML readers and text to others; write false, or 'no' in quotes",
        ),
        ("run.dir=" + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("steps", "write key.sub=value"),
        ("train.steps.x=1", "is a single value and has no setting"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(DEMO, [override])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_unreadable_files(tmp_path: Path) -> None:
    for name, content, message in (
        ("a", b"a: [", "not valid YAML"),
        ("b", b"- 1", "mapping"),
        ("c", b"\xff\xfe\x00", "not valid YAML"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_config(tmp_path / name)
    (tmp_path / "sex.yaml").touch()
    with pytest.raises(UserError, match=r"no file '.*none.yaml'$"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"no file '.*six.yaml' \(did you mean '.*sex.yaml'\?\)$"):
        load_config(tmp_path / "six.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nseed: 010", "line 2: 010 is an octal number"),
        ("seed: 1:30", "1:30 is a number in base 60"),
        ("run: {dir: off}", "off is false to some"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("seed: " + "9" * 5000, "a number of 5,000 characters"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(
                f"{y}: &{y} [" + ",".join([f"*{x}"] * 10) + "]\n"
                for x, y in ("ab", "bc", "cd", "de", "ef")
            ),
            "more than 100,000",
        ),
    ],
)
def test_yaml_that_readers_disagree_about_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_all_yaml_readers_agree_about_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: '010'\nb: \"yes\"\nc: True\nd: 0\ne: 0.5\nf: 1e-3\ng: 12:x\nh: 0x10")
    assert read_yaml(path) == {
        "a": "010",
        "b": "yes",
        "c": True,
        "d": 0,
        "e": 0.5,
        "f": 1e-3,
        "g": "12:x",
        "h": 16,
    }


def test_a_missing_setting_is_named() -> None:
    raw = dump_config(load_config(DEMO))
    del raw["train"]
    with pytest.raises(UserError, match="train: missing"):
        build_config(raw)


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        ([], 4, 4),
        (["parallel.tensor=2"], 8, 4),
        (["parallel.tensor=2"], 3, "do not divide the world size 3"),
        ([], 3, r"batch.global: \d+ is not a multiple of batch.micro x data-parallel size"),
    ],
)
def test_world_size(overrides: list[str], world: int, expected: Any) -> None:
    config = load_config(DEMO, ["batch.global=16", "batch.micro=2", *overrides])
    if isinstance(expected, int):
        assert config.check_world(world) == expected
    else:
        with pytest.raises(UserError, match=expected):
            config.check_world(world)


def test_names_in_messages_are_whole() -> None:
    """Every refusal of a combination starts with the full name of a setting."""
    names = {"parallel"}
    for key, _ in settings(RunConfig):
        names |= {key, key.partition(".N.")[0]}  # a list is named without its items too
    started_with = []
    for module in ("rules.py", "run.py"):
        source = (ROOT / "llada" / "config" / module).read_text()
        source = source.replace("mixture.{i}.weight_at", "mixture")
        started_with += re.findall(r'Error\(\s*f?"([a-zA-Z_.]+): ', source)
    assert len(started_with) > 12
    assert set(started_with) <= names
