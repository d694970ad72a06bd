"""The running of experiments: training, evaluation, checkpoints, logs and what a person sees."""
