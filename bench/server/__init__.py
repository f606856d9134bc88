"""`headrace bench server`: a load generator, and the server beside a bare loop, LitServe and plain Ray Serve."""
