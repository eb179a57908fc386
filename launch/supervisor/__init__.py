"""What stands beside the ranks of a job on the batch host: starts them, judges how they end, and what comes next."""
