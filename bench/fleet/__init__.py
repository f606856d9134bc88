"""`headrace bench fleet`: a capacity model with constants measured here, and a simulation of a fleet that checks it."""
