"""A file for each family of formats beside the scalar one: a subclass of Quantizer, and a row in methods.py."""
