"""Who judges painted pictures: networks that took no part in training, and the demo's own CLIP, named as that."""
