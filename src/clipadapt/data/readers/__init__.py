"""Labelled images from folders, tables, split files, hub data sets, shards and lists."""
