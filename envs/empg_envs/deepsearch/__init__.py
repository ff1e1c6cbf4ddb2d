"""Multi-turn question answering with a search engine: Deep Search in the conventions of Search-R1."""
