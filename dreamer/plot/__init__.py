"""`dreamer plot`: from scores of runs to curves, bands and tables."""
