"""How a reader works: the order of an epoch, the thread that reads ahead, its buffers, and the way to the device."""
