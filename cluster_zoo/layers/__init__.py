"""What the architectures share: clustering, grids, the cluster mixer and the nearest-centroid head."""
