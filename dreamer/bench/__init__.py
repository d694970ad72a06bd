"""`dreamer bench` and `dreamer train --plan`: what parts of a run cost."""
