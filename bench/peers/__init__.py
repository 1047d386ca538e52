"""What else delivers shuffled batches of documents, each used as its documentation says: see ``__main__``."""

import sys
from importlib.util import find_spec
from types import ModuleType

import torch

# mosaicml-streaming imports torchvision. A build of it for CUDA fails beside a torch for the CPU alone, where it
# describes its operators to torch; nothing here calls any.
if torch.version.cuda is None and find_spec("torchvision") is not None:
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
