"""Other people's trainers, each by a module of its own that needs the trainer's package; see decision 0028."""
