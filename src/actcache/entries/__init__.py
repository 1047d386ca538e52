"""One batch in or out: entries checked and encoded, collected by the writer, looked up and read."""
