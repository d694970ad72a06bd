"""Many runs from one file: which ones, where they run, what becomes of them."""
