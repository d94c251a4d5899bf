"""Diffusion mathematics: pure functions of tensors, with the randomness passed in."""
