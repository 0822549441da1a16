"""Many runs: which, on what, and what became of each. A run knows nothing of the sweep it belongs to."""
