"""From a config to a submitted job: checks, snapshot, batch script."""
