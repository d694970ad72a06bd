"""Checkpoints, the weights in them, and the lock of a logdir."""
