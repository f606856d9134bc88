"""Server-side repair: a tail that is taught to live with what quantisation took, while the edge stays as it is.

`distil.py` trains, `data.py` gives it decoded features, `student.py` holds what is trained, `tail.py` runs the result.
"""
