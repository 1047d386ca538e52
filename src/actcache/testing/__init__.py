"""For authors of backends: the conformance suite, and the in-memory backend that serves as its oracle."""
