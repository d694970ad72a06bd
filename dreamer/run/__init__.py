"""The training loop and its parts: from a configuration to updates, evaluations and an exit code."""
