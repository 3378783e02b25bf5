"""Finding pictures: by words, by pictures, by both, among millions; duplicates and groups."""
