"""Training upper layers from stored rows: regimes, adapters, pooling, sweeps over layers."""
