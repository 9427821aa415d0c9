"""Runs on a cluster: what is submitted, what supervises it there, and what is seen from outside."""
