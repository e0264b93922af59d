"""Terms: what joins a trainer's loss, one registered class per file, and what runs them around `compute_loss`."""
