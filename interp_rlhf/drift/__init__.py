"""What a run does to the inside: metrics on pairs of activations, and the callback that logs them."""
