"""What runs inside a job.

Standard library only: it starts before the environment of the ranks is there.
"""
