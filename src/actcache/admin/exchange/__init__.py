"""A space's entries as files and data sets that other programs read, and back. docs/format.md describes the files."""

from actcache.admin.exchange.exporting import Exported, export_space
from actcache.admin.exchange.huggingface import CachedActivations, export_sae_lens, put_dataset, to_dataset
from actcache.admin.exchange.importing import Imported, import_file

__all__ = [
    "CachedActivations",
    "Exported",
    "Imported",
    "export_sae_lens",
    "export_space",
    "import_file",
    "put_dataset",
    "to_dataset",
]
