"""Training: the trainer, the first step, evaluations, checkpoints, resume."""
