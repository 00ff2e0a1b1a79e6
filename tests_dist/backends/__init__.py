"""Local kernels: one process, each backend (or a fake of its package) against dense attention."""
