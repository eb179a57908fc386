"""What a trained network is worth: validation loss, distances to real pictures, agreement with captions, memorisation."""
