"""config.json: the published fields, all of them, and what is not computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llada.hf.configuration_llada import LLaDAConfig
from llada.hf.modeling_llada import LLaDAModelLM
from tests.hf.folders import PUBLISHED_8B
from tests.hf.models import hf_config, section


@pytest.mark.parametrize("given", [{}, PUBLISHED_8B])
def test_the_config_is_the_published_one_by_default_and_written_in_full(
    given: dict[str, Any], tmp_path: Path
) -> None:
    LLaDAConfig(**given).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written.pop("transformers_version")
    assert written == PUBLISHED_8B


def test_every_field_comes_back_and_transformers_own_names_work(tmp_path: Path) -> None:
    config = hf_config(
        section(num_query_groups=2, tie_embeddings=True),
        embedding_size=192,
        max_sequence_length=77,
        rope_theta=1e4,
    )
    config.save_pretrained(tmp_path)
    back = LLaDAConfig.from_pretrained(tmp_path)
    fields = LLaDAConfig.published_fields()
    assert {name: getattr(back, name) for name in fields} == {
        name: getattr(config, name) for name in fields
    }
    assert (
        back.hidden_size,
        back.num_hidden_layers,
        back.num_attention_heads,
        back.num_key_value_heads,
    ) == (64, 2, 4, 2)
    assert (back.intermediate_size, back.max_position_embeddings, back.tie_word_embeddings) == (
        96,
        77,
        True,
    )


def test_the_tokenizers_size_is_written_only_where_it_is_known(tmp_path: Path) -> None:
    hf_config(section(), tokenizer_vocab_size=127).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer_vocab_size"] == 127
    assert LLaDAConfig.from_pretrained(tmp_path).tokenizer_vocab_size == 127
    assert "tokenizer_vocab_size" not in hf_config(section()).to_diff_dict()


def test_sizes_left_out_follow_from_the_others() -> None:
    config = LLaDAConfig(
        d_model=64,
        n_heads=8,
        mlp_hidden_size=None,
        mlp_ratio=3,
        vocab_size=100,
        eos_token_id=0,
        pad_token_id=0,
    )
    assert (config.n_kv_heads, config.mlp_hidden_size, config.embedding_size) == (8, 192, 100)
    assert LLaDAConfig(n_kv_heads=None, multi_query_attention=True).n_kv_heads == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_type", "swiglu"),
        ("alibi", True),
        ("attention_dropout", 0.1),
        ("attention_layer_norm", True),
        ("bias_for_layer_norm", True),
        ("block_group_size", 2),
        ("block_type", "sequential"),
        ("embedding_dropout", 0.1),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("input_emb_norm", True),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("residual_dropout", 0.1),
        ("rope", False),
        ("rope_full_precision", False),
        ("scale_logits", True),
        # sizes that contradict each other
        ("n_heads", 33),
        ("n_kv_heads", 5),
        ("multi_query_attention", True),
        ("embedding_size", 100),
        ("tie_word_embeddings", True),
        ("tokenizer_vocab_size", 126465),
        ("tokenizer_vocab_size", 0),
    ],
)
def test_what_is_not_computed_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}|{field}='{value}'") as caught:
        LLaDAConfig(**{**PUBLISHED_8B, field: value})
    assert "\n" not in str(caught.value)


def test_everything_wrong_is_named_at_once_and_late_changes_are_caught() -> None:
    with pytest.raises(ValueError, match=r"alibi=True .only False., rope=False .only True."):
        LLaDAConfig(rope=False, alibi=True)
    config = hf_config(section())
    config.alibi = True
    with pytest.raises(ValueError, match="alibi"):
        LLaDAModelLM(config)
