"""Training: loop, checkpoints, tasks."""
