"""Where stores lie: a folder, or a prefix of an object store."""
