"""DreamerV3 on JAX: learn a world model, learn to act inside it."""
