"""Experiments on the registered problems, as ``fixpoint bench`` runs them."""
