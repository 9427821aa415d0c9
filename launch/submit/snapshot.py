"""Copies the code of a run into its folder.

The job runs the copy, so later changes of the checkout do not affect it.
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


def take_snapshot(target: Path) -> Path:
    """Copy the packages and the git revision to a new folder, and return the folder.

    `python TARGET ...` is then the `llada` command.
    """
    target.mkdir(parents=True)
    for package in PACKAGES:
        folder = Path(str(package.__file__)).parent
        # Bytecode is copied too, or every rank would compile the package. It stays valid because
        # copytree keeps the modification times of the source files. Files with a name like
        # cli.cpython-311.pyc.1400 are just being written by another process, and disappear.
        in_progress = shutil.ignore_patterns("*.pyc.*")
        shutil.copytree(folder, target / folder.name, ignore=in_progress)
    shutil.copyfile(target / "llada" / "__main__.py", target / "__main__.py")
    write_atomically(target / revision.FILE, f"{revision.of_code() or ''}\n")
    sync_tree(target)
    return target
