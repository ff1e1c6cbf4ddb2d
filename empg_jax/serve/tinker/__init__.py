"""The Tinker API under ``/api/v1``: a client sends batches and steps, the server trains its model."""
