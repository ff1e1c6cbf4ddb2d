"""The sampling engine: slots, a KV cache, compiled programs. It knows tokens and weights, no environment."""
