"""From finished trajectories to batches: buffer, packing, storage."""
