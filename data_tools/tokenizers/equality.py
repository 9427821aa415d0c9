"""Do two encoders give the same ids? The comparison, and texts on which libraries may differ."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_tools.batches import in_batches
from data_tools.tokenizers.sentencepiece import special_pieces
from llada.arrays import I64
from llada.tokenizer import SPECIAL_TOKENS, Tokenizer

Encode = Callable[[list[str]], tuple[I64, I64]]

_BATCH_CHARACTERS = 1 << 20
_SHOWN_CHARACTERS = 40
_VOCABULARY_TEXTS = 4096
_RANDOM_TEXTS = 400
_RANDOM_SEED = 20250214  # any number; fixed, so that every process checks the same texts

# Libraries split text into words with their own regular expressions, which treat runs of spaces,
# line ends and Unicode's other spaces specially.
_SPACES = (
    "",
    " ",
    "  ",
    "   ",
    " " * 7,
    " " * 100,
    "\n",
    "\n\n",
    "\n \n",
    "\r\n",
    "\r",
    "\r\n\r\n",
    "\t",
    "\t\t",
    " \t ",
    "\v",
    "\f",
)
_ODD_SPACES = (
    "\x85",
    "\xa0",
    "\u1680",
    "\u2003",
    "\u2028",
    "\u2029",
    "\u202f",
    "\u205f",
    "\u3000",
    "\u200b",
    "\u2060",
    "\ufeff",
    "\u180e",
)
# Texts that some library has encoded wrongly: contractions, runs of digits, operators, identifiers,
# paths, combining characters, emoji sequences, scripts without spaces, right-to-left text, control
# characters, non-characters, characters that byte-level BPE and SentencePiece use themselves, texts
# that look like special tokens, and words longer than caches or buffers.
_WRITING = (
    "don't I'm we've they'll it'd you're DON'T I'M WE'VE 's 't d'être l’eau '''s",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 1e-9 0xFF ١٢٣ १२३ ½ ² Ⅷ １２３ 0"
    + "7" * 70,
    'x**2!=y[0]->f(a,b);//c/*d*/#e$f%g^h&i*(j)_k+l={m}|n\\o:p"q<r>s?t~u`v@w',
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case v1.2.3-rc4 __init__ a.b.c",
    "https://example.org/a/b?c=d&e=f%20g#h user@example.org C:\\Windows\\x.dll ../../etc",
    (
        "e\u0301 é n\u0303 ñ A\u030a Å Å ﬁ ﬀ ǆ ﷺ \u1100\u1161\u11a8 각"
        " Z\u0351\u036b\u0343a\u0321l\u0356g\u0323o"
    ),
    (
        "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd"
        " \U0001f1e9\U0001f1ea ☃\ufe0f 🙂🙂🙂 1\ufe0f\u20e3"
    ),
    "日本語の文章です。中文没有空格，所以很长。 한국어 텍스트 ｶﾀｶﾅ ひらがな 日本 語 𠮷野家",
    "שלום עולם مرحبا بالعالم \u202eevil\u202c \u200fabc\u200e नमस्ते ไทยภาษา ქართული ᏣᎳᎩ ǅ ıİßẞ ςσ",
    "\ufeffbyte order mark \ufeff inside",
    "\x00 \x00\x00 a\x00b \x01\x02\x07\x08\x0e\x1b[0m\x1f\x7f \x80\x9f \xad soft\xadhyphen",
    (
        "\ufffd \ufffe \uffff \ufdd0 \U0001fffe \U0010ffff \U0010fffd \U000e0041 \ue000 \uf8ff"
        " \uf8ffA \uf8ffB \uf8ff\uf8ff"
    ),
    "\u2581 \u2581\u2581 a\u2581b \u2581a a\u2581 \u2581 a",
    "\u0120hello \u010a \u0100 Ġ Ċ ĉ Ã© Â",
    (
        "<0x41> <0x0A> <0xFF> <0x00> <unk> <s>hi</s> <s> </s> <pad> <mask> [MASK] [CLS] [UNK]"
        " [INST]x[/INST] ##ing @@ </w>"
    ),
    "def f(x):\n    if x:\n\treturn x  \n\n\n    # end   \n        \n}",
    "a" * 999,
    " a" * 333,
    "ab" * 2000,
    "-" * 80,
    "=" * 257,
    "\n" * 65,
    "\t" * 33,
    "あ" * 300,
    "\u0301" * 70,
    "🙂" * 70,
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 12,
    "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo0123456789+/" * 40,
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08" * 8,
)

_UNIFORM_RANGES = (
    (0x3400, 0x4DC0),
    (0x4E00, 0xA000),
    (0xAC00, 0xD7A4),
    (0xE000, 0xF900),
    (0x17000, 0x18D00),
    (0x20000, 0x323B0),
)
"""Ranges of code points that libraries treat alike: ideographs, Hangul, Tangut, private use. Their
ends are checked in full, and every 16th code point between them.
"""
_LAST_CODE_POINTS = (*range(0xE0000, 0xE01F0), 0xF0000, 0xFFFFD, 0x100000, 0x10FFFD, 0x10FFFF)


# -- comparison ------------------------------------------------------------------------------------


def first_difference(candidate: Encode, reference: Encode, texts: Sequence[str]) -> str | None:
    """Return the first text to which two encoders give different ids, shortened for a message.

    Returns:
        A Python literal of the text, or of a part that shows the difference; None if there is none.
    """
    for batch in in_batches(texts, len, _BATCH_CHARACTERS):
        ids, lengths = candidate(batch)
        reference_ids, reference_lengths = reference(batch)
        if np.array_equal(lengths, reference_lengths) and np.array_equal(ids, reference_ids):
            continue
        for text in batch:
            if _differ(candidate, reference, text):
                return _shortened(text, candidate, reference)
        return "a batch of texts that are right one by one"
    return None


def _differ(candidate: Encode, reference: Encode, text: str) -> bool:
    return not np.array_equal(candidate([text])[0], reference([text])[0])


def _shortened(text: str, candidate: Encode, reference: Encode) -> str:
    """Return the first line, or half of it, or half of that, ... that still shows a difference."""
    for line in text.splitlines(keepends=True):
        if _differ(candidate, reference, line):
            text = line
            break
    while len(text) > _SHOWN_CHARACTERS:
        middle = len(text) // 2
        if _differ(candidate, reference, text[:middle]):
            text = text[:middle]
        elif _differ(candidate, reference, text[middle:]):
            text = text[middle:]
        else:
            # The difference spans the middle.
            return f"{text[:_SHOWN_CHARACTERS]!r}... ({len(text):,} characters)"
    return repr(text)


# -- texts -----------------------------------------------------------------------------------------


def fixed_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the texts on which encoders of a tokenizer are compared, whatever the input is.

    They are about a million characters: spaces, scripts, nearly every code point, and the
    tokenizer's tokens and special tokens.
    """
    texts = [*_SPACES, *_ODD_SPACES, *_WRITING]
    for space in (*_SPACES, *_ODD_SPACES):
        texts += [f"a{space}", f"{space}a", f".{space}1", f"é{space}é"]
    for text in _WRITING[:12]:
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            texts.append(unicodedata.normalize(form, text))
    texts += _special_token_texts(tokenizer)
    texts += _vocabulary_texts(tokenizer)
    texts += _random_texts()
    texts += _character_texts()
    return texts


def _special_token_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield every special or added token: alone, inside words, and misspelled."""
    names = set(SPECIAL_TOKENS)
    names.update(token for token, _ in tokenizer.special_tokens().values())
    if isinstance(tokenizer.definition, bytes):
        names.update(special_pieces(tokenizer.definition))
    else:
        added_tokens = json.loads(tokenizer.definition).get("added_tokens") or []
        names.update(token["content"] for token in added_tokens)
    for name in sorted(names):
        yield name
        yield f"{name}{name}"
        yield f"a{name}b"
        yield f" {name} "
        yield f"x {name} y\n{name}\n"
        yield name[:-1]
        yield name[1:]
        yield name.upper()


def _vocabulary_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield evenly spaced tokens of the vocabulary, each with the next one."""
    size = tokenizer.vocab_size
    for token_id in range(0, size, max(1, size // _VOCABULARY_TEXTS)):
        pair = [token_id, min(token_id + 1, size - 1)]
        yield tokenizer.decode(pair, skip_special_tokens=True)


def _random_texts() -> Iterator[str]:
    """Yield spaces, words and characters of the other texts in random order."""
    generator = random.Random(_RANDOM_SEED)
    parts = [*_SPACES, *_ODD_SPACES]
    for text in _WRITING:
        parts += text.split(" ")[:40]
    parts += list("'.,;:!?-_(){}<>|/\\\"0123456789aZéßあ")
    for _ in range(_RANDOM_TEXTS):
        yield "".join(generator.choices(parts, k=generator.randrange(2, 25)))


def _character_texts() -> Iterator[str]:
    """Yield every character between letters, before a digit and after a space, 32 per text.

    Libraries implement different versions of Unicode, which may disagree on what is a letter.
    """
    left_out: set[int] = set()
    for first, last in _UNIFORM_RANGES:
        left_out.update(point for point in range(first + 32, last - 32) if point % 16)
    points = []
    for point in (*range(0x323B0), *_LAST_CODE_POINTS):
        is_surrogate = 0xD800 <= point < 0xE000  # no character, and not in UTF-8
        if not is_surrogate and point not in left_out:
            points.append(point)
    for start in range(0, len(points), 32):
        characters = map(chr, points[start : start + 32])
        yield "".join(f"a{character}b {character}7{character}\n" for character in characters)
