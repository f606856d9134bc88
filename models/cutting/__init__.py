"""Where a backbone can be cut: its graph, the places where few tensors carry all that follows, what lies before them.

`graph.py` traces, `graph_passes.py` clears what tracing leaves, `cuts.py` finds places and makes head and tail,
`layout.py` and `maps.py` say how what crosses is packed, `costs.py` what each part costs.
"""
