"""A space's entries as one file that other programs read, and back. docs/format.md describes the files."""

from actcache.admin.exchange.exporting import Exported, export_space
from actcache.admin.exchange.importing import Imported, import_file

__all__ = ["Exported", "Imported", "export_space", "import_file"]
