"""Python imports this at the start of every process whose PYTHONPATH begins with this folder: it
plants a mistake there.
"""

from tests.mutations.planting import install

install()
