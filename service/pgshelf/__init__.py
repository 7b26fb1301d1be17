"""pgshelf: a vector document store that lives in PostgreSQL."""

from importlib.metadata import version

__version__ = version("pgshelf")
