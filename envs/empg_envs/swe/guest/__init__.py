"""What runs inside a sandbox: its first process, and the runner of tests. Standard library only."""
