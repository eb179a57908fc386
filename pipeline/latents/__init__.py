"""The contract between preprocessing and training: what a latent data set on disk is (format 1)."""
