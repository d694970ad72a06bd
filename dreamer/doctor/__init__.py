"""`dreamer doctor`: checks of a machine."""
