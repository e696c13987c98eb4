"""Cards that are not there: torch's fake tensors on devices of a backend written in Python.

A CPU build of torch has no autograd for fake CUDA tensors, and a CUDA build on a machine without a
card has none from torch 2.14 on (`hasPrimaryContext expects a valid device index`). A backend of
one's own has it in every build. Shapes, dtypes and devices are real, values are not: what reads one
raises, and so does an operation between two devices.
"""
