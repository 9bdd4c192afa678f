"""The GPT itself, to be read in an afternoon: first `ops`, then `model`, `optim`, `train`, `generate`."""
