"""Many runs from one file: which runs, where they run, and how they end."""
