"""Opens data sets. Each layout of a data set has one module, for indexed and for streamed reading."""
