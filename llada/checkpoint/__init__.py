"""Checkpoints: one home for their format, for writing and for reading them.

    names.py             names of checkpoint folders, and which are complete
    format.py            commit marker, state.json; begin, commit, read, resolve
    verification.py      compares the files of a checkpoint with the checksums in its marker
    retention.py         deletes old checkpoints, renames superseded ones
    saving.py            one save over all ranks: either every rank succeeds or all raise
    background.py        writes a rank's files in a thread while training goes on
    optimizer_state.py   the distributed optimizer's state as rectangles, which any layout can read
    reading.py           tensors of a checkpoint, some rows at a time, without an engine
    raw_values.py        where the values of a stored tensor lie in its file
    canonical.py         the weights of a checkpoint by canonical name
    writing.py           canonical weights as a checkpoint, without an engine

The engine, `llada.hf`, sampling and training import this package; it imports none of them.
"""
