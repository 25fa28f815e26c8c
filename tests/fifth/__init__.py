"""A fifth target, as somebody would add it: runtime.py as a file of runtimes/, target.py as one of export/."""
