"""PPO for today's TRL: `GRPOTrainer`'s rollouts and policy loss, a value function, and rewards at every token."""
