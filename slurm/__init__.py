"""Slurm jobs: rendered by pure functions, submitted by one; knows neither torch nor the trainer."""
