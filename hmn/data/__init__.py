"""Real images: reading them, drawing per-class batches, augmenting."""
