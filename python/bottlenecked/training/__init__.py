"""Training a Processor for a backbone: data, tasks and probes; this package loads none of its modules."""
