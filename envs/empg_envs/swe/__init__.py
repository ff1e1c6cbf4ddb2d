"""Repository repair: an agent fixes a bug in a sandbox, and the repository's own tests judge the fix."""
