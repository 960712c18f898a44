"""Other implementations to measure against. They share no code with `bottlenecked`."""
