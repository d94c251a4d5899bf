"""The dataset format: manifests, tars with indexes, and how they are published and read."""
