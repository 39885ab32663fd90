"""Chains: layers between which values stay int8, run by one operator, ``int8_chain``."""
