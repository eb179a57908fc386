"""Whether a run is well: heartbeats, replicas, bad steps, what is written of them and the way back."""
