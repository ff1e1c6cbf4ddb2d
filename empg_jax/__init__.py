"""Train multi-turn LLM agents in JAX with entropy-modulated policy gradients (EMPG, AEM)."""

__version__ = "0.2.0"
