"""Images with masks: datasets, classes, transforms and sampling."""
