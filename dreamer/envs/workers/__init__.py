"""Where environments run: in the training process or in worker processes, behind a fence."""
