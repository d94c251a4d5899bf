"""The accounts of a run: seconds, joules, metrics and the report made of them."""
