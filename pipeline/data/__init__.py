"""From a latent data set to the batches of a run: order, shares, loader."""
