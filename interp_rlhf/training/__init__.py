"""What enters a trainer: concept rewards, and the mixin through which they see the rollout."""
