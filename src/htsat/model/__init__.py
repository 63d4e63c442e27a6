"""The network, its checkpoints, and published weights."""
