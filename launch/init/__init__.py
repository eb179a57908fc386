"""`ldm init`: looks at a folder of pictures with captions, proposes a run for it, writes config and report; no torch."""
