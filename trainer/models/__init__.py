"""Networks: denoisers, autoencoders and text encoders behind small adapters; no ranks."""
