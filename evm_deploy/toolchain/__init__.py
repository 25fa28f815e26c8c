"""The native libraries: their sources, compilers, platforms and places."""
