"""Importers and tools around drover's HDF5 formats (data/FORMAT.md)."""

__version__ = "1.0"
