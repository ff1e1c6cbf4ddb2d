"""Repository repair: an agent with a shell mends a bug in a cage, and the repository's own tests judge it."""
