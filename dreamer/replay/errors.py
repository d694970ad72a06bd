"""The one exception of replay."""


class ReplayError(RuntimeError):
    """Data that does not fit the buffer, a request it cannot answer, or a file that cannot be trusted."""
