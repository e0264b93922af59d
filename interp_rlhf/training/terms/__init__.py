"""Terms that join a trainer's loss, one registered class per file, and the code that runs them around `compute_loss`."""
