"""Codecs of others that are learned here, from the same photographs as ours, to be measured beside them."""
