"""Jobs, attempts and nodes: knows neither torch nor the trainer, only the files of a run."""
