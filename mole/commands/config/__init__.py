"""`mole config …`: what there is to choose from."""
