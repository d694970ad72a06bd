"""One file per suite of environments, and what they share."""
