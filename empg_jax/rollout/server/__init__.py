"""Sampling by another program: the wires of servers, the client, and an engine made of both."""
