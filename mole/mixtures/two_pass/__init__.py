"""The routing pass: a first pass for routers that read hidden states, its cache beside the mixture's, what it saves."""
