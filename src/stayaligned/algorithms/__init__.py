"""The mathematics of the papers, in torch, written to be read beside them."""
