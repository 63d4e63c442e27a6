"""Labelled recordings: corpora, mixing and augmentation."""
