"""From masks to plans: options, ready-made plans, the degree of head sharding. No torch."""
