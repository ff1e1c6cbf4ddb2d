"""What a configuration needs: memory planned, times expected from a chip's peaks, and both measured here."""
