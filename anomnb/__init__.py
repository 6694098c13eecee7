"""Visual anomaly detection as literate notebooks."""
__version__ = "0.1.0"
