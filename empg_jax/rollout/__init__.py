"""Episodes: engine, environment workers, and what runs between them."""
