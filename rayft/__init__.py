"""rayft: fine-tuning on Ray. From recipe to served adapter, nothing is lost and nothing changes silently."""

__version__ = "0.1.0"
