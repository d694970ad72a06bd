"""`dreamer play`: the dream of a run, played in a browser beside the real environment."""
