"""Chat model to aligned model: reward model, DPO, PPO and GRPO."""
