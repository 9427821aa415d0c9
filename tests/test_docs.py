"""The docs against the code: links lead somewhere; commands, options and settings exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import yaml
from pydantic import BaseModel

from llada.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
    for path in ROOT.glob(name)
)
SHELL_FENCES = {"", "bash", "sh", "shell", "console"}
FILE_SUFFIXES = {"py", "yaml", "json", "jsonl", "safetensors", "txt", "md", "bin"}
OVERRIDE = re.compile(r"([a-z][a-z_]*(?:\.[a-z0-9_]+)*)=")


class Block(NamedTuple):
    """A code block: fenced, or indented by four spaces (then `language` is empty)."""

    line: int
    language: str  # the whole info string of the fence
    text: str


def split_markdown(text: str) -> tuple[list[Block], list[tuple[int, str]]]:
    """The code blocks of a document, and its lines outside fences with their numbers (from 1)."""
    blocks: list[Block] = []
    prose: list[tuple[int, str]] = []
    fence, language, start, body = "", "", 0, []
    for number, line in enumerate(text.splitlines(), 1):
        opened = re.match(r"\s*(`{3,}|~{3,})\s*(.*)$", line)
        if fence:
            if opened and opened[1].startswith(fence) and not opened[2].strip():
                blocks.append(Block(start, language, "\n".join(body)))
                fence = ""
            else:
                body.append(line)
        elif opened:
            fence, language, start, body = opened[1], opened[2].strip(), number + 1, []
        else:
            if line.startswith("    "):
                blocks.append(Block(number, "", line.strip()))
            prose.append((number, line))
    return blocks, prose


def inline_code(prose: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The spans between single backticks, with their line numbers."""
    for number, line in prose:
        for span in re.findall(r"`([^`]+)`", line):
            yield number, span.strip()


# --- spelling

BRITISH = {
    "behaviour": "behavior",
    "centre": "center",
    "colour": "color",
    "favour": "favor",
    "initialis": "initializ",
    "labelled": "labeled",
    "learnt": "learned",
    "licence": "license",
    "modelling": "modeling",
    "neighbour": "neighbor",
    "normalis": "normaliz",
    "optimis(?!tic)": "optimiz",
    "recognis": "recogniz",
    "serialis": "serializ",
    "spelt": "spelled",
    "summaris": "summariz",
    "synchronis": "synchroniz",
    "tokenis": "tokeniz",
    "vectoris": "vectoriz",
}
"""British forms, as patterns, and the American ones that are used instead, like in the libraries
around this project.
"""


@pytest.mark.parametrize("british", BRITISH)
def test_words_are_spelled_as_in_america(british: str) -> None:
    sources = [
        path for name in ("llada", "data_tools", "launch") for path in (ROOT / name).rglob("*.py")
    ]
    wrong = []
    for path in (*DOCUMENTS, ROOT / "tests/README.md", *sources):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        if re.search(british, text, re.IGNORECASE):
            wrong.append(f"{name}: write {BRITISH[british]}")
    assert not wrong


# --- links


def heading_anchors(path: Path) -> set[str]:
    """The anchors GitHub gives the headings of a document."""
    headings = [
        re.match(r"#{1,6}\s+(.*)", line)
        for _, line in split_markdown(path.read_text(encoding="utf-8"))[1]
    ]
    return {
        re.sub(r"[^\w\- ]", "", heading[1].strip().lower()).replace(" ", "-")
        for heading in headings
        if heading
    }


def broken_links(path: Path) -> list[str]:
    broken = []
    for number, line in split_markdown(path.read_text(encoding="utf-8"))[1]:
        for target in re.findall(
            r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", re.sub(r"`[^`]*`", "", line)
        ):
            if re.match(r"[a-z][a-z+.-]*:", target):
                continue  # http:, mailto:
            file, _, anchor = target.partition("#")
            resolved = (path.parent / file).resolve() if file else path
            if not resolved.exists() or (
                anchor and resolved.suffix == ".md" and anchor not in heading_anchors(resolved)
            ):
                broken.append(f"{path.name}:{number} {target}")
    return broken


# --- commands


def llada_commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line and words (after `llada`) of every llada command that a document shows."""
    blocks, prose = split_markdown(text)
    for block in blocks:
        if block.language.split(" ")[0] in SHELL_FENCES:
            joined = re.sub(r"\s*\\\n\s*", " ", block.text)
            for line in joined.split("\n"):
                if block.language != "console" or line.lstrip().startswith("$ "):
                    yield from ((block.line, words) for words in commands_of_line(line))
    for number, span in inline_code(prose):
        if re.match(r"(\.venv/bin/)?llada\s", span):
            yield from ((number, words) for words in commands_of_line(span))


def commands_of_line(line: str) -> Iterator[list[str]]:
    """The words after `llada` (or `-m llada`) in each command of a shell line.

    Prompts, launchers and output are passed over.
    """
    # Aligned lists show a command and, after two or more spaces, what it is for or the next
    # command.
    for part in re.split(r"\s{2,}(?=[A-Za-z(])", line.strip().removeprefix("$ ")):
        try:
            lexer = shlex.shlex(part, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            lexer.commenters = "#"
            words = list(lexer)
        except ValueError:  # an apostrophe in a sentence: a command has none that is unbalanced
            words = part.split()
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|&;"):
                start = command_start(command)
                if start is not None:
                    yield command[start:]
                command = []
            else:
                command.append(word)


def command_start(words: list[str]) -> int | None:
    """Where the arguments of llada begin, when this is a llada command."""
    for index, word in enumerate(words):
        if re.fullmatch(r"(.*/)?llada", word) and (index == 0 or is_launcher(words[:index])):
            return index + 1
    return None


def is_launcher(words: list[str]) -> bool:
    """Whether `llada` may follow: `torchrun ... -m`, `python -m`, `srun ...`, NAME=value."""
    words = [word for word in words if not re.match(r"[A-Z_][A-Z0-9_]*=", word)]
    return (
        not words
        or words[-1] == "-m"
        or Path(words[0]).name in {"srun", "time", "torchrun", "timeout", "nohup", "env", "exec"}
    )


def is_placeholder(word: str) -> bool:
    """`...`, CONFIG, <file>, [options], {a,b}, $NAME: to be filled in by the reader."""
    return bool(re.match(r"(\.\.\.|…|[<\[{$(]|[A-Z][A-Z0-9_-]*$)", word))


def command_problem(root: Any, words: list[str]) -> str | None:
    """What is wrong with a command's subcommand or options, or None.

    Args:
        root: the click command of `llada`.
        words: what follows `llada`.
    """
    command = root
    known = {"--help", *options_of(root)}
    for word in words:
        if set(word) <= set("<>&"):
            break  # a redirection ends the arguments
        if word.startswith("[--"):
            word = word.strip("[]")
        if re.match(r"--?[A-Za-z]", word):
            option = word.strip("[]").partition("=")[0]
            if option not in known:
                return f"no option {option}; {command.name} has {', '.join(sorted(known))}"
        elif commands := getattr(command, "commands", None):
            if is_placeholder(word):
                return None
            if word not in commands and (usual := getattr(command, "default_command", None)):
                command = commands[usual]  # `llada launch CONFIG`
                known |= options_of(command)
                continue
            if word not in commands:
                return f"no command '{word}'; there are {', '.join(sorted(commands))}"
            command = commands[word]
            known |= options_of(command)
            # `llada launch data-prepare` hands its options on to `llada data prepare`
            if command.context_settings.get("ignore_unknown_options"):
                known |= options_of(root.commands["data"].commands[word.removeprefix("data-")])
    return None


def options_of(command: Any) -> set[str]:
    return {
        option
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


# --- settings


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The settings groups inside an annotation: one in `Group`, `Group | None` and `list[Group]`,
    several in `Group | Variant`, none in that of a single value.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def settings_of(sections: list[type[BaseModel]]) -> dict[str, Any]:
    """Setting -> annotation, by the names of the YAML file (`batch.global`, not `global_`)."""
    return {
        field.alias or name: field.annotation
        for section in sections
        for name, field in section.model_fields.items()
    }


def key_problem(key: str) -> str | None:
    """What is wrong with a dotted key, or None. Indices of lists are passed over."""
    sections: list[type[BaseModel]] = [RunConfig]
    for part in key.split("."):
        if part.isdigit():
            continue
        if not sections:
            return f"{key}: '{part}' lies below a single value"
        settings = settings_of(sections)
        if part not in settings:
            return f"{key}: no setting '{part}'; there are {', '.join(settings)}"
        sections = sections_of(settings[part])
    return None


def keys_of(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a parsed YAML document."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield f"{prefix}{name}"
            yield from keys_of(below, f"{prefix}{name}.")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from keys_of(below, f"{prefix}{index}.")


def documented_keys(text: str) -> Iterator[tuple[int, str]]:
    """Line and dotted key of every setting in a document.

    Settings stand in YAML blocks, as overrides of commands, and as inline code.
    """
    blocks, prose = split_markdown(text)
    for block in blocks:
        # A fence with more than the one word (```yaml cluster) is some other file than a run's
        # config.
        if block.language in {"yaml", "yml"}:
            parsed = yaml.safe_load(re.sub(r"(?m)^\s*(\.\.\.|…)\s*$", "", block.text))
            yield from ((block.line, key) for key in keys_of(parsed))
    for number, words in llada_commands(text):
        # `lr=` beside --rewind is that option's own, not a setting.
        for word in words:
            override = OVERRIDE.match(word)
            if override and not (word.startswith("lr=") and "--rewind" in words):
                yield number, override[1]
    groups = {
        name for name, annotation in settings_of([RunConfig]).items() if sections_of(annotation)
    }
    for number, span in inline_code(prose):
        match = re.fullmatch(r"([a-z_]+(?:\.[a-z0-9_]+)+)(=\S*)?", span)
        if not match:
            continue
        key, value = match.groups()
        parts = key.split(".")
        if re.fullmatch(r"model\..+\.weight", key):
            continue  # a tensor
        if value is None and parts[-1] in FILE_SUFFIXES:
            continue  # a file, as data.json
        if parts[0] in groups:
            yield number, key


# --- the tests


def command_line() -> Any:
    """The click command behind `llada`."""
    from typer.main import get_command

    from llada.cli import app

    return get_command(app)


def tracked_files() -> list[Path]:
    """The files git tracks, and those it would; every file when this is not a git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [
            path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()
        ]
    unpacked = (path for path in ROOT.rglob("*") if path.is_file())
    return [
        path
        for path in unpacked
        if not {".venv", "build", "runs", "__pycache__"} & set(path.relative_to(ROOT).parts)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path):
    assert not broken_links(path)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path: Path):
    root = command_line()
    shown = llada_commands(path.read_text(encoding="utf-8"))
    wrong = [
        f"{path.name}:{line} llada {' '.join(words)}: {problem}"
        for line, words in shown
        if (problem := command_problem(root, words))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_exist(path: Path):
    shown = documented_keys(path.read_text(encoding="utf-8"))
    wrong = [
        f"{path.name}:{line} {problem}" for line, key in shown if (problem := key_problem(key))
    ]
    assert not wrong, (
        "\n".join(wrong)
        + "\n(a YAML block that is not a run's config: give its fence a second word, as in ```yaml"
        " cluster)"
    )


def test_no_file_names_a_place_of_one_machine():
    # Spelt in pieces, so that this file does not name them.
    hosts = ["py" + "pi.org", "python" + "hosted", "deb.deb" + "ian.org", "registry.npm" + "js"]
    forbidden = re.compile("|".join(map(re.escape, [*hosts, "/" + "work/"])), re.IGNORECASE)
    files = tracked_files()
    assert files
    forbidden_places = []
    for path in files:
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue  # binary
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
            if match := forbidden.search(line):
                forbidden_places.append(f"{path.relative_to(ROOT)}:{number} {match[0]}")
    assert not forbidden_places, "\n".join(forbidden_places)


# --- the checks find what they are for

SAMPLE = """
# A title, and more

[here](#a-title-and-more) [gone](#nowhere) [file](missing.md) [web](https://example.org) `[no](link)`

```bash
# llada is told in this comment
$ llada config x.yaml seed=1 batch.global_=4
CUDA_VISIBLE_DEVICES=0 torchrun --nproc-per-node 2 -m llada pretrain x.yaml \\
    train.steps=5 && .venv/bin/llada config x.yaml > out.txt
cd llada
```

    llada config CONFIG [key.sub=value ...]      what it's for
    llada/        a folder

```yaml
train: {steps: 3, step: 4}
data:
  mixture:
    - {path: x, wieght: 2}
```

```yaml cluster
anything: 1
```

Set `batch.global=8`, `model.depth` or `data.json`; run `llada config`.
"""  # noqa: E501


def test_the_checks_find_what_is_wrong(tmp_path: Path):
    document = tmp_path / "sample.md"
    document.write_text(SAMPLE, encoding="utf-8")
    assert [link.split(" ")[1] for link in broken_links(document)] == ["#nowhere", "missing.md"]

    commands = [words for _, words in llada_commands(SAMPLE)]
    assert commands == [
        ["config", "x.yaml", "seed=1", "batch.global_=4"],
        ["pretrain", "x.yaml", "train.steps=5"],
        ["config", "x.yaml", ">", "out.txt"],
        ["config", "CONFIG", "[key.sub=value", "...]"],
        ["config"],
    ]
    wrong = [
        problem.partition(":")[0]
        for _, key in documented_keys(SAMPLE)
        if (problem := key_problem(key))
    ]
    assert wrong == ["train.step", "data.mixture.0.wieght", "batch.global_", "model.depth"]


def test_unknown_commands_and_options_are_found():
    import typer
    from typer.main import get_command

    app, data = typer.Typer(), typer.Typer()
    app.add_typer(data, name="data")

    @data.command()
    def prepare(workers: int = 1) -> None: ...

    @app.command()
    def config(path: str) -> None: ...

    root = get_command(app)
    for good in (
        "data prepare --workers 4",
        "data prepare [--workers N]",
        "data ...",
        "config CONFIG",
        "--help",
        "data --help",
    ):
        assert command_problem(root, good.split()) is None, good
    for bad in ("prepare", "data prepair", "data prepare --worker 4", "config x --workers 2"):
        assert command_problem(root, bad.split()), bad
