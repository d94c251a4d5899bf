"""Kiln's configuration: YAML only; this file makes `pkg://conf` importable."""
