"""A preparation as a job: units of work over processes and tasks, and the folder they fill."""
