"""Deep Search: multi-turn question answering with a search engine, in the conventions of Search-R1."""
