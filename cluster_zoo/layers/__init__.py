"""Layers that the architectures share: clustering, grids, stem, cluster mixer, nearest-centroid head."""
