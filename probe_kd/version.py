"""The version, for the package, its reports and its exports."""

__version__ = "0.1.0"
