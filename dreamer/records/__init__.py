"""What a run reports: metrics and where they go, pictures, videos, the health of its model, what a person sees."""
