"""Two peers translate English to German on a small real corpus; see README.md beside this file."""
