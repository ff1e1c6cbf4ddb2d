"""ALFWorld's text games without TextWorld: official files, both releases, new games in their format."""
