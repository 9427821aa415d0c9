"""`model.diffusion_generate`: its tokens against the sampler of the package, another
implementation, and its refusals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from llada.hf.modeling_llada import LLaDAModelLM
from llada.sampling import diffusion
from llada.sampling.diffusion import SamplingOptions, SpecialIds
from tests.hf.models import made

MASK, KNOWN = 100, 120
"""[MASK] in the middle of the ids, and fewer ids than the 128 rows."""


def model(**shape: Any) -> LLaDAModelLM:
    """Random weights under which [MASK] and the rows of no token would be the first choice
    everywhere.
    """
    hf = made(num_query_groups=2, **shape)
    hf.config.mask_token_id, hf.config.tokenizer_vocab_size = MASK, KNOWN
    with torch.no_grad():
        last = hf.get_output_embeddings().weight
        last *= 0.5
        pull = (
            hf(torch.full((1, 4), MASK), output_hidden_states=True).hidden_states[-1].mean((0, 1))
        )
        last[MASK] = last[KNOWN:] = pull
    return hf


def prompts(rows: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(0, MASK, (rows, length), generator=torch.Generator().manual_seed(3))


def wanted(hf: LLaDAModelLM, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    """From the package's own sampler."""
    options, specials = SamplingOptions(**settings), SpecialIds(MASK, 1, KNOWN)
    return diffusion.generate(lambda ids: hf(ids).logits.detach(), prompt, specials, options)


def test_without_limits_the_model_would_write_what_it_may_not() -> None:
    """Otherwise the tests below would show nothing about these ids."""
    hf = model()
    best = hf(torch.cat([prompts(), torch.full((2, 12), MASK)], 1)).logits[:, 5:].argmax(-1)
    assert ((best == MASK) | (best >= KNOWN)).any()


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize(
    ("steps", "block"), [(12, None), (5, None), (1, None), (6, 6), (6, 4), (12, 4), (3, 4), (4, 3)]
)
def test_the_tokens_are_those_of_the_packages_sampler(
    steps: int, block: int | None, cfg: float
) -> None:
    hf, prompt = model(), prompts()
    generated = hf.diffusion_generate(
        prompt, max_new_tokens=12, steps=steps, block_length=block, cfg_scale=cfg
    )
    assert torch.equal(generated[:, :5], prompt)
    assert torch.equal(
        generated[:, 5:], wanted(hf, prompt, length=12, steps=steps, block_length=block, cfg=cfg)
    )
    assert (generated != MASK).all() and (generated < KNOWN).all()
    assert len(generated[:, 5:].unique()) > 2, "not one token everywhere"


def test_one_token_a_step_is_the_default_and_a_prompt_may_be_empty() -> None:
    hf = model(tie_embeddings=True)
    generated = hf.diffusion_generate(max_new_tokens=8)
    assert torch.equal(
        generated, wanted(hf, torch.empty(1, 0, dtype=torch.long), length=8, steps=8)
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gaps_are_filled_as_by_the_packages_sampler(steps: int) -> None:
    hf, text = model(), prompts(2, 11)
    text[0, [2, 3, 7, 10]] = text[1, [0, 5]] = MASK
    generated = hf.diffusion_generate(text, max_new_tokens=0, steps=steps)
    expected = diffusion.infill(
        lambda ids: hf(ids).logits.detach(),
        text,
        SpecialIds(MASK, 1, KNOWN),
        SamplingOptions(steps=steps),
    )
    assert torch.equal(generated, expected)
    assert torch.equal(generated[text != MASK], text[text != MASK])
    if steps == 4:
        assert torch.equal(hf.diffusion_generate(text, max_new_tokens=0), generated), (
            "by default one a token of the row with most"
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings", [{"steps": 6}, {"steps": 8, "block_length": 2}, {"steps": 8, "cfg_scale": 1.0}]
)
def test_a_padded_row_gives_what_it_gives_alone(side: str, settings: dict[str, Any]) -> None:
    hf, prompt = model(), prompts()
    settings = {"max_new_tokens": 8, **settings}
    if settings["steps"] == 6:
        settings["max_new_tokens"] = 6
    columns = slice(3, 5) if side == "left" else slice(0, 2)
    ids, mask = prompt.clone(), torch.ones_like(prompt)
    mask[0] = 0
    mask[0, columns] = 1
    ids[0][mask[0] == 0] = MASK  # whatever stands there
    generated = hf.diffusion_generate(ids, mask, **settings)
    assert torch.equal(
        generated[0, 5:], hf.diffusion_generate(prompt[:1, columns], **settings)[0, 2:]
    )
    assert torch.equal(generated[1:], hf.diffusion_generate(prompt[1:], **settings))
    assert torch.equal(generated[:, :5], ids)


def test_gaps_beside_padding_are_filled_as_alone() -> None:
    hf, text = model(), prompts(2, 9)
    text[0, [4, 6]] = text[1, 3] = MASK
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    text[0, :3] = MASK
    generated = hf.diffusion_generate(text, mask, max_new_tokens=0)
    assert torch.equal(
        generated[0, 3:], hf.diffusion_generate(text[:1, 3:], max_new_tokens=0, steps=2)[0]
    )
    assert (generated[0, :3] == MASK).all(), "padding is not written"


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"remasking": "random"}])
def test_a_generator_decides_the_noise(settings: dict[str, Any]) -> None:
    hf, prompt = model(), prompts()

    def sample(seed: int) -> torch.Tensor:
        return hf.diffusion_generate(
            prompt,
            max_new_tokens=12,
            steps=6,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        )

    generated = sample(7)
    assert torch.equal(generated, sample(7))
    assert not torch.equal(generated, sample(8))
    assert (generated[:, 5:] != MASK).all() and (generated < KNOWN).all()
    torch.manual_seed(7)
    assert torch.equal(
        generated, hf.diffusion_generate(prompt, max_new_tokens=12, steps=6, **settings)
    ), "torch's own by default"


def test_a_temperature_samples_from_the_softmax() -> None:
    """One token after a prompt: chi squared of 4,000 draws against softmax(logits / T) over the ids
    that may be written.
    """
    hf, draws, temperature = model(), 4000, 0.7
    prompt = prompts(1, 3)
    logits = (
        hf(torch.cat([prompt, torch.full((1, 1), MASK)], 1)).logits[0, -1, :KNOWN].double().detach()
    )
    logits[MASK] = -torch.inf
    chance = (logits / temperature).softmax(-1)
    generated = hf.diffusion_generate(
        prompt.expand(draws, -1),
        max_new_tokens=1,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    often = chance * draws >= 5
    counts = torch.bincount(generated[:, -1], minlength=KNOWN).double()
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([chance[often], chance[~often].sum()[None]]) * draws
    freedom = len(seen) - 1
    assert freedom > 5
    # mean f, standard deviation sqrt(2 f): five of them above is one run in millions
    assert float(((seen - expected) ** 2 / expected).sum()) < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: -1 is less than 0"),
        ({"max_new_tokens": 8.0}, "max_new_tokens: 8.0 is not a whole number"),
        ({"steps": [4]}, r"steps: \[4\] is not a whole number"),
        ({"temperature": "hot"}, "temperature: hot is not a number of at least 0"),
        ({"steps": 0}, "steps: 0 is not a positive multiple of the 1 blocks"),
        ({"steps": 9, "block_length": 4}, "steps: 9 is not a positive multiple of the 2 blocks"),
        ({"block_length": 3}, "block_length: 3 is not a divisor of max_new_tokens, 8"),
        ({"block_length": 0}, "block_length: 0"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"cfg_scale": float("inf")}, "cfg_scale: inf"),
        (
            {"remasking": "entropy"},
            "remasking: 'entropy' is not allowed; one of low_confidence, random",
        ),
        ({"num_tokens": 129}, "num_tokens: 129 is not from 1 to the 128 rows"),
        ({"num_tokens": 0}, "num_tokens: 0"),
        (
            {"input_ids": torch.zeros(5, dtype=torch.long)},
            r"input_ids: torch.int64 of shape \(5,\)",
        ),
        ({"input_ids": torch.zeros(2, 5)}, "input_ids: torch.float32"),
        (
            {"attention_mask": torch.ones(2, 6)},
            r"attention_mask: shape \(2, 6\) is not that of input_ids, \(2, 5\)",
        ),
        ({"input_ids": torch.tensor([[3, MASK]])}, r"a prompt with \[MASK\] cannot be continued"),
        ({"max_new_tokens": 0}, r"no \[MASK\] to fill"),
        ({"max_new_tokens": 0, "block_length": 2}, "there are no blocks"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_one_line(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model().diffusion_generate(**{"input_ids": prompts(), "max_new_tokens": 8, **settings})
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    hf, prompt = model(), prompts()
    wanted = hf.diffusion_generate(prompt, max_new_tokens=8, steps=4)
    assert torch.equal(
        hf.diffusion_generate(
            prompt, max_new_tokens=np.int64(8), steps=np.int32(4), temperature=np.float32(0)
        ),
        wanted,
    )


def test_a_model_without_a_mask_token_is_refused() -> None:
    hf = model()
    hf.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id: the config has none"):
        hf.diffusion_generate(prompts())


def test_num_tokens_goes_before_the_config_and_the_rows_are_the_last_resort() -> None:
    hf = model()
    assert (hf.diffusion_generate(prompts(), max_new_tokens=8, num_tokens=50)[:, 5:] < 50).all()
    hf.config.tokenizer_vocab_size = None
    assert (hf.diffusion_generate(prompts(), max_new_tokens=8)[:, 5:] >= KNOWN).any()


def test_generate_of_transformers_writes_by_diffusion_and_pads_what_follows_an_end() -> None:
    hf, prompt = model(), prompts()
    plain = hf.diffusion_generate(prompt, max_new_tokens=12, steps=6)
    end, pad = int(plain[0, 7]), 99
    generated = hf.generate(
        prompt,
        max_new_tokens=12,
        steps=6,
        eos_token_id=[end, MASK],
        pad_token_id=pad,
        num_beams=1,
        top_p=None,
    )
    for row, wanted in zip(generated.tolist(), plain.tolist(), strict=True):
        stop = next((i for i in range(5, 17) if wanted[i] == end), 17)
        assert row == wanted[: stop + 1] + [pad] * (16 - stop)
    assert generated[0, 8] == pad
    by_config = GenerationConfig(max_length=17, eos_token_id=[end], pad_token_id=pad)
    assert torch.equal(
        hf.generate(input_ids=prompt, generation_config=by_config, steps=6), generated
    )
    assert hf.generate(max_new_tokens=3).shape == (1, 3)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0.7}, 0.7),
    ],
)
def test_sampling_is_chosen_as_in_transformers(
    settings: dict[str, Any], temperature: float
) -> None:
    hf, draw = model(), torch.Generator
    hf.config.eos_token_id = 127  # never written
    hf.generation_config.eos_token_id = None
    wanted = hf.diffusion_generate(
        prompts(), max_new_tokens=6, temperature=temperature, generator=draw().manual_seed(5)
    )
    assert torch.equal(
        hf.generate(prompts(), max_new_tokens=6, generator=draw().manual_seed(5), **settings),
        wanted,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"top_p": 0.9, "num_beams": 4},
            (
                r"top_p=0.9, num_beams=4 not supported: text is written by diffusion.*see"
                r" diffusion_generate"
            ),
        ),
        (
            {"generation_config": GenerationConfig(repetition_penalty=1.2)},
            "repetition_penalty=1.2 not supported",
        ),
        ({"step": 3}, "step=3 not supported"),
        ({"max_new_tokens": [5]}, r"max_new_tokens: \[5\] is not a whole number"),
        ({"max_length": 5, "max_new_tokens": None}, "0 new tokens are less than 1"),
    ],
)
def test_settings_for_text_from_left_to_right_are_refused_in_one_line(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model().generate(prompts(), **{"max_new_tokens": 4, **settings})
    assert "\n" not in str(caught.value)


def test_peft_finds_a_name_that_nobody_calls() -> None:
    with pytest.raises(NotImplementedError, match="diffusion_generate"):
        model().prepare_inputs_for_generation(prompts())
