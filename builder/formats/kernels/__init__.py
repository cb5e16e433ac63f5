"""Packing and unpacking of weights on arrays in memory, at the speed of memory where the C extension is built.

`packing` is what others call. The arithmetic is that of `builder/formats/arithmetic/`, bit for bit.
"""
