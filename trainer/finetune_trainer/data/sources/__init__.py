"""Where samples come from. One file per layout of a data set, streamed or not."""
