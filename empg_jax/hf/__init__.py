"""Import from and export to Hugging Face formats: configuration, tensor names, weights files, adapters."""
