"""The only place that knows ranks: communication, engine, EMA, checkpoints, signals."""
