"""The entries of both papers, one module a kind of table or picture."""
