"""What is stored: keys, recipes, codecs, ragged blocks, extents, checksums, files of named arrays."""
