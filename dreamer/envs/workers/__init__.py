"""Where environments run: in the training process or in workers, fenced."""
