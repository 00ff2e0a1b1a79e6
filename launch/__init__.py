"""Entry points: the command line, the demo job, benchmarks, examples."""
