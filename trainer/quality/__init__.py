"""How good pictures are: features by pretrained networks, and statistics of the features."""
