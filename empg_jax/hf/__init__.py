"""Exchange with Hugging Face: hub, configuration, names of tensors, weights files, adapters, presets."""
