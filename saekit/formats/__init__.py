"""File formats of dictionaries, one a file. ``saekit.load`` recognises a format by the files it finds."""

from saekit.formats.format import UNSUPPORTED, Contents, Dictionary, Format
from saekit.formats.registry import FORMATS, files_of, format_of, save, writer

__all__ = ["FORMATS", "UNSUPPORTED", "Contents", "Dictionary", "Format", "files_of", "format_of", "save", "writer"]
