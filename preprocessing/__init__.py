"""Image-caption shards in, a verified latent data set out."""
