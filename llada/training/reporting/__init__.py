"""What a run tells about itself: the reporter, and where its metrics go."""
