"""What a run reports: the reporter, and where its metrics go."""
