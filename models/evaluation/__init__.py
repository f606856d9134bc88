"""What `headrace eval` measures beside operating points, and what it makes of that: curves, intervals, costs."""
