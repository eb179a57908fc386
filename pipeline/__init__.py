"""Latent diffusion: the data contract, the model, its mathematics and its training."""
