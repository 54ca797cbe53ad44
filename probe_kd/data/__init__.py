"""What the models see, and what a teacher gave for it: images, data sets, loaders, the cache."""
