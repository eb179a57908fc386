"""`ldm submit`: from a config to the jobs of one run, checked before they cost a place in the queue."""
