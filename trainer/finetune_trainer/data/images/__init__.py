"""From image files to pixels: decoding, the image scan, and generated class images."""
