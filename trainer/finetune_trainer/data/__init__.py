"""From a data set to micro-batches: sources, sample order, keyed draws, the cache of frozen encoders' outputs."""
