"""What a run will need and cost, worked out from its config alone."""
