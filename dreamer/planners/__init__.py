"""Planners: action sequences and trees, tried out in a model of the world before one action is taken."""
