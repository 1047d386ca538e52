"""What else delivers shuffled batches of short documents, each used as its documentation says: see ``__main__``."""
