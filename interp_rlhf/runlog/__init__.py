"""The run log: the append-only file of typed events that a run writes and everything else reads. No torch."""
