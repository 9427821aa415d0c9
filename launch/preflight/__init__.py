"""Tests of the nodes before the first step of a run."""
