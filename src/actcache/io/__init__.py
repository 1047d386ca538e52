"""The operating system: files that are published durably, mapped files, threads, where progress goes."""
