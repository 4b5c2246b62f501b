"""The sources of the kernel, in C; ``runtime/build.py`` compiles them."""
