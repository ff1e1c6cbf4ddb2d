"""The decoder: layers, attention, adapters, quantization, and its head."""
