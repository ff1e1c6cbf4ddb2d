"""Environments of other packages and protocols; each is imported only when it is chosen."""
