"""Commands, the demo, README and the package as it is shipped."""
