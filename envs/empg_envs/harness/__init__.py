"""Agents that are programs of their own: they call the policy over the OpenAI wire."""
