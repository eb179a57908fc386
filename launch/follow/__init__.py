"""What happens to a run after its submission: how far it is, what it says, and its end on request."""
