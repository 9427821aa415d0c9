"""What can be done with prepared corpora: inspect, verify, merge, split, export, import."""
