"""`llada demo`: real text to a model that completes, fills gaps and answers, through the same
commands' code as a large run.
"""

from llada.demo.stages import run_demo

__all__ = ["run_demo"]
