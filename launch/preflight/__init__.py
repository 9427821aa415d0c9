"""Tests of the nodes before the first step of a run. launch.job.bad_nodes judges what they find."""
