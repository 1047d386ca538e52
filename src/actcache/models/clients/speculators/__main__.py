"""``python -m actcache.models.clients.speculators``: the library's own command, which knows our backend."""

from speculators.cli import app

import actcache.models.clients.speculators  # noqa: F401  fills the registry before the command reads it

if __name__ == "__main__":
    app(prog_name="speculators")
