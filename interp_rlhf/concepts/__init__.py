"""From activations to concept scores: pooling, probes, directions, readouts, and the cards that describe them."""
