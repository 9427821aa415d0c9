"""The code of a run, kept with it: what a job runs next week is what was submitted today, whatever
happens to the checkout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import data_tools
import launch
import llada
from llada import revision
from llada.files import sync_tree, write_atomically

PACKAGES = (llada, data_tools, launch)


def take(target: Path) -> Path:
    """Copy the packages to `target`, with the git revision; `python TARGET ...` then is the `llada`
    command.

    Args:
        target: folder to make.
    """
    target.mkdir(parents=True)
    for package in PACKAGES:
        source = Path(str(package.__file__)).parent
        # With the bytecode, which is valid where the source's time is kept, as here: else every
        # rank of the run would compile it. What another process is just writing there comes and
        # goes under a name like cli.cpython-311.pyc.1400.
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("*.pyc.*"))
    shutil.copyfile(target / "llada" / "__main__.py", target / "__main__.py")
    write_atomically(target / revision.FILE, f"{revision.of_code() or ''}\n")
    sync_tree(target)
    return target
