"""The one version number: of the package, of its wheel, and in every run.json."""

__version__ = "0.1.0"
