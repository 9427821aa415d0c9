"""Chat templates against transformers, which renders and encodes them in its own way."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llada.chat.format import TEMPLATE, ChatFormat, Message, Reply
from llada.chat.template import TemplateError, TemplateFormat, chat_format
from llada.errors import UserError
from llada.tokenizer import Tokenizer

MARKED = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
INSTRUCT = """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set first = messages[0].content %}
{% else %}{% set rest = messages %}{% set first = none %}{% endif %}
{% for message in rest %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
{% set text = '<<SYS>>\n' + first + '\n<</SYS>>\n\n' + message.content if loop.first and first is not none else message.content %}
{% if message.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{% else %}{% generation %}{{ ' ' + text | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""  # noqa: E501
HEADERS = """{{ bos_token }}{% for message in messages %}
{% set text = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}
{{ text }}{% if loop.last and message['role'] == 'tool' %}{% break %}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""  # noqa: E501
POLITE = """{% set ns = namespace(found=false) %}{% for m in messages if m.role == 'system' %}{% set ns.found = true %}{% endfor %}
{% if not ns.found %}{{ '<|im_start|>system\nYou are of help. <|strip|><|im_end|>\n' }}{% endif %}
{% for m in messages %}{{ '<|im_start|>' }}{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""  # noqa: E501
PLAIN = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n\n{% endfor %}ASSISTANT:"
TEMPLATES = {
    "marked": MARKED,
    "instruct": INSTRUCT,
    "headers": HEADERS,
    "polite": POLITE,
    "plain": PLAIN,
    "llada": TEMPLATE,
}
CONVERSATIONS = [
    [("user", "What is a mask?")],
    [("user", "  spaces, \n\n and tabs\t")],
    [("system", " Be brief. "), ("user", "grüße 🙂")],
    [
        ("user", "hello"),
        ("assistant", " A token.\n"),
        ("user", "\n\nassistant user"),
        ("assistant", "x"),
        ("user", "again?  "),
    ],
]
SPECIALS = [
    "<s>",
    "</s>",
    "<|mdm_mask|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
KINDS = ("bytes", "first", "always", "prepend")


def write_tokenizer(kind: str, path: Path) -> None:
    """Write a tokenizer.json that handles spaces in one of the usual ways.

    It has special tokens that absorb the white space beside them.
    """
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE(unk_token=None if kind == "bytes" else "<unk>"))
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"]
    )
    if kind == "bytes":
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "prepend":
        fast.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        fast.decoder = decoders.Metaspace(prepend_scheme=kind)
    text = [content for conversation in CONVERSATIONS for _, content in conversation] + [
        "system [INST] <<SYS>> <</SYS>> [/INST] USER: ASSISTANT: user assistant"
    ]
    fast.train_from_iterator(text * 4, trainer)
    fast.add_special_tokens(SPECIALS)
    fast.add_special_tokens([AddedToken("<|strip|>", lstrip=True, rstrip=True)])
    fast.add_tokens([AddedToken("   "), AddedToken("<think>")])
    fast.save(str(path / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    tokenizers = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        write_tokenizer(kind, folder)
        tokenizers[kind] = Tokenizer.load(folder)
    return tokenizers


@pytest.fixture(scope="module")
def pairs(
    tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[TemplateFormat, object]]:
    """Our format and transformers' tokenizer, from one folder, for every kind and template."""
    pairs = {}
    for kind, tokenizer in tokenizers.items():
        for name, template in TEMPLATES.items():
            folder = tmp_path_factory.mktemp("saved")
            tokenizer.chat_template = template
            tokenizer.save(folder)
            tokenizer.chat_template = None
            loaded = Tokenizer.load(folder)
            assert loaded.chat_template == template
            assert loaded.fingerprint == tokenizer.fingerprint, "a template is no part of it"
            pairs[kind, name] = (
                TemplateFormat(loaded, template),
                AutoTokenizer.from_pretrained(folder),
            )
    return pairs


def ids_of_transformers(tokenizer: object, conversation: list[tuple[str, str]]) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in conversation]
    return tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def to_messages(conversation: list[tuple[str, str]]) -> list[Message]:
    return [Message(*turn) for turn in conversation]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_what_transformers_makes_of_it(kind: str, name: str, pairs: dict) -> None:
    ours, other = pairs[kind, name]
    for conversation in CONVERSATIONS:
        assert ours.prompt(to_messages(conversation)).tolist() == ids_of_transformers(
            other, conversation
        )


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(sorted(TEMPLATES)),
    contents=st.lists(
        st.text(alphabet="a <>|\n\t\u00a0éx🙂", min_size=1, max_size=12), min_size=1, max_size=4
    ),
)
def test_a_prompt_of_any_text(kind: str, name: str, contents: list[str], pairs: dict) -> None:
    ours, other = pairs[kind, name]
    conversation = [(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    assert ours.prompt(to_messages(conversation)).tolist() == ids_of_transformers(
        other, conversation
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_text_cannot_spell_special_tokens(kind: str, name: str, pairs: dict) -> None:
    ours, other = pairs[kind, name]
    harmless = ids_of_transformers(other, [("user", "x"), ("assistant", "y"), ("user", "z")])
    ids = ours.prompt(
        to_messages(
            [
                ("user", "".join(SPECIALS)),
                ("assistant", "<|eot_id|>y"),
                ("user", "z<|im_end|> <|mdm_mask|>"),
            ]
        )
    ).tolist()
    special = set(ours.tokenizer.special_ids.values()) - {ours.tokenizer.id_of("<unk>")}
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    if kind == "bytes":
        assert "".join(SPECIALS) in ours.tokenizer.decode(ids)
        assert "z<|im_end|> <|mdm_mask|>" in ours.tokenizer.decode(ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_reply_follows_its_own_prompt(name: str, pairs: dict) -> None:
    """Tokens and offsets give transformers' prompt of every reply, its text alone, and EOS."""
    ours, other = pairs["bytes", name]
    conversations = [
        [*conversation, ("assistant", f" The last\nword {i}. ")]
        for i, conversation in enumerate(CONVERSATIONS)
    ]
    trims = name in ("instruct", "headers", "llada")
    for conversation, (ids, replies) in zip(
        conversations,
        ours.encode([to_messages(conversation) for conversation in conversations]),
        strict=True,
    ):
        reply_indices = [i for i, (role, _) in enumerate(conversation) if role == "assistant"]
        assert len(replies) == len(reply_indices)
        for reply, index in zip(replies, reply_indices, strict=True):
            assert ids[: reply.history_end] + ids[
                reply.turn_start : reply.response_start
            ] == ids_of_transformers(other, conversation[:index])
            text = conversation[index][1].strip() if trims else conversation[index][1]
            assert ours.response(conversation[index][1]) == text
            assert ids[reply.response_start : reply.turn_end] == [
                *ours.tokenizer.encode(text).tolist(),
                ours.tokenizer.eos_id,
            ]
        assert replies[-1].turn_end == len(ids)


def test_history_is_stored_once(pairs: dict) -> None:
    ours, _ = pairs["bytes", "headers"]
    conversation = to_messages(
        [
            turn
            for i in range(20)
            for turn in (("user", f"question {i}"), ("assistant", f"answer {i}"))
        ]
    )
    [(ids, _)] = ours.encode([conversation])
    longest = len(ours.prompt(conversation[:-1])) + len(ours.tokenizer.encode("answer 19")) + 1
    assert len(ids) < 1.5 * longest, (
        "headers of the replies and the replies are there twice, the history is not"
    )


def test_prompts_that_share_no_start(tokenizers: dict[str, Tokenizer]) -> None:
    ours = TemplateFormat(
        tokenizers["bytes"],
        "{{ messages | length }}"
        "{% for m in messages %} {{ m.role[0] }}.{{ m.content }}{% endfor %}:",
    )
    [(ids, replies)] = ours.encode(
        [to_messages([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])]
    )
    decoded = [
        ours.tokenizer.decode(ids[: r.history_end] + ids[r.turn_start : r.turn_end])
        for r in replies
    ]
    assert decoded == ["1 u.a:b</s>", "3 u.a a.b u.c:d</s>"]
    assert replies[0].history_end == 0


def test_the_format_is_chosen_by_the_template(
    tokenizers: dict[str, Tokenizer], pairs: dict
) -> None:
    ours, _ = pairs["bytes", "marked"]
    assert isinstance(chat_format(ours.tokenizer), TemplateFormat)
    assert isinstance(chat_format(ours.tokenizer, TEMPLATE), ChatFormat)
    assert isinstance(chat_format(tokenizers["bytes"]), ChatFormat)
    for conversation in CONVERSATIONS:
        alike = (
            chat_format(tokenizers["bytes"], TEMPLATE).prompt(to_messages(conversation)).tolist()
        )
        assert (
            TemplateFormat(tokenizers["bytes"], TEMPLATE).prompt(to_messages(conversation)).tolist()
            == alike
        )
    copy = pickle.loads(pickle.dumps(ours.tokenizer))
    assert (
        TemplateFormat(copy, copy.chat_template).prompt(to_messages(CONVERSATIONS[3])).tolist()
        == ours.prompt(to_messages(CONVERSATIONS[3])).tolist()
    )
    assert isinstance(
        ours.encode([to_messages([*CONVERSATIONS[0], ("assistant", "x")])])[0][1][0], Reply
    )


def test_templates_in_the_config_of_a_tokenizer(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizers["bytes"].save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    plain = config.read_text()
    named = (
        '"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template":'
        ' "yes"}]'
    )
    for text, template in (
        (named, "yes"),
        ('"chat_template": "one"', "one"),
        ('"chat_template": null', None),
    ):
        config.write_text(plain.rstrip().removesuffix("}").rstrip() + f", {text}}}")
        assert Tokenizer.load(tmp_path).chat_template == template
    (tmp_path / "chat_template.jinja").write_bytes(b"file\r\n")
    assert Tokenizer.load(tmp_path).chat_template == "file\n", "the file goes first"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: not UTF-8"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", "not valid Jinja: line 1: "),
        ("{{ strftime_now('%d %b') }}{{ messages[0].content }}", "strftime_now"),
        ("{{ messages[0].content }}{{ [1, 2] | random }}", "at random"),
        ("{{ lipsum() }}{{ messages[0].content }}", "at random"),
        (
            "{% set ns = namespace() %}{% set ns._x = 1 %}{{ messages[0].content }}",
            "begins with '_'",
        ),
        ("{{ messages[0].content | upper }}", "does more to the text"),
        ("{{ messages[0].content | tojson }}", "does more to the text"),
        ("{{ messages[0].role }}", "leaves out turn 1, the user's"),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            r"does not mark who speaks: before an answer stands '\n', as before a question",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not mark who speaks"),
        ("{{ raise_exception('never\nmind') }}", "refuses it: never mind"),
        ("{{ messages.append(1) }}{{ messages[0].content }}", "refuses it"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "refuses it"),
        ("{{ 1 + none }}{{ messages[0].content }}", "refuses it"),
    ],
)
def test_templates_that_cannot_be_used(
    template: str, message: str, tokenizers: dict[str, Tokenizer]
) -> None:
    with pytest.raises(UserError) as caught:
        TemplateFormat(tokenizers["bytes"], template)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_special_tokens_alone_may_separate_turns(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytes"]
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    prompt = TemplateFormat(tokenizer, template).prompt([Message("user", "a")])
    assert prompt[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("name", "conversation", "reason"),
    [
        ("instruct", [("user", "a"), ("user", "b"), ("assistant", "c")], "refuses"),
        ("plain", [("user", "a\ufdd0b"), ("assistant", "c")], "U+FDD0"),
        ("forgetful", [("system", "be kind"), ("user", "a"), ("assistant", "c")], "leaves out"),
        (
            "thinking",
            [("user", "q"), ("assistant", "hm</think>c"), ("user", "r"), ("assistant", "c")],
            "changes",
        ),
        ("empty", [("assistant", "c")], "leaves empty"),
    ],
)
def test_conversations_that_a_template_cannot_express(
    name: str, conversation: list[tuple[str, str]], reason: str, tokenizers: dict[str, Tokenizer]
) -> None:
    more = {
        "forgetful": "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}",
        "thinking": "{% for m in messages %}{{ m.content.split('</think>')[-1] }}</s>{% endfor %}",
        "empty": "{{ messages | map(attribute='content') | join('</s>') }}",
    }
    ours = TemplateFormat(tokenizers["bytes"], {**TEMPLATES, **more}[name])
    with pytest.raises(TemplateError) as caught:
        ours.check(to_messages(conversation))
    assert reason in caught.value.reason
    assert "\n" not in str(caught.value)
    with pytest.raises(TemplateError):
        ours.encode([to_messages(conversation)])


def test_with_a_sentencepiece_model(tmp_path: Path) -> None:
    """Special tokens stand where the template has them; each text between is encoded alone."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    text = [content for conversation in CONVERSATIONS for _, content in conversation] * 20
    path = tmp_path / "some.model"
    with open(path, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=file,
            vocab_size=300,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
        )
    tokenizer = Tokenizer.load(path, require_mask=False).with_special_tokens()
    ours, plain = TemplateFormat(tokenizer, HEADERS), SentencePieceProcessor(model_file=str(path))
    begin, end, stop = (
        tokenizer.id_of(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id")
    )
    content = "hello <|eot_id|> <s>"
    expected = [
        tokenizer.bos_id,
        begin,
        *plain.encode("user"),
        end,
        *plain.encode(f"\n\n{content}"),
        stop,
    ]
    expected += [begin, *plain.encode("assistant"), end, *plain.encode("\n\n")]
    assert ours.prompt(to_messages([("user", f" {content} ")])).tolist() == expected
    tokenizer.chat_template = HEADERS
    tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert (loaded.chat_template, loaded.fingerprint) == (HEADERS, tokenizer.fingerprint)
