"""Scripts that measure the package. Each prints a table, writes JSON or draws a picture; none is installed."""
