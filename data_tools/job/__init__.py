"""Preparing a corpus: units of work, divided among processes and tasks, and the output folder.

`build` runs the whole preparation. It uses the other modules in this order: `output` (the output
folder), `work_plan` (the units), `pool` (worker processes), `worker` (the work on one unit),
`finish` (making the corpus of the finished units).
"""
