"""ALFWorld's text games without TextWorld: official games, both text releases, and generated games."""
