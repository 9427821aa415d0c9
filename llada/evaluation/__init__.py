"""Validation losses: how they are measured, what error they have, and how two runs compare.

Imports neither training nor hf, which both use it.
"""
