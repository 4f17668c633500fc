"""Scripts that print a table, write JSON with versions and hardware, and draw a picture. Not part of the package."""
