"""All stages on the synthetic world, measured."""
