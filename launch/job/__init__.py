"""What runs inside a job: the supervisor of the batch script, and the parent of every rank.

Standard library only: it starts before the environment of the ranks is there.
"""
