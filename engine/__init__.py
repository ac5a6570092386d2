"""A DDP training engine for instruction tuning that you can read, trust and outrun. Start at train.py."""

__version__ = "0.1.0"
