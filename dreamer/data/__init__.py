"""Data from elsewhere into a replay."""
