"""Does a Processor help? Accuracy on the same items, with intervals; this package loads none of its modules."""
