"""Looking at machines, runs and models."""
