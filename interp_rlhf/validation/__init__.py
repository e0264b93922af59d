"""What speaks for a probe, and whether it is enough: baselines, controls, and the gate."""
