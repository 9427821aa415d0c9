"""A preparation as a job: units of work over processes and tasks, and the folder they fill.

`build` is the whole, from inputs to a corpus. It uses the other modules in this order: `output`
(where it is written), `work_plan` (which units), `pool` (which process does a unit), `worker` (what
is done with it), `finish` (the corpus that the units become).
"""
