"""What a run will need and cost, computed from its config alone."""
