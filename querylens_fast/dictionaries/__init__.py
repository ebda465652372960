"""Sparse dictionaries: key and value vectors of features, where in the model they act, and the files they come from."""

from querylens_fast.dictionaries.dictionary import Dictionary
from querylens_fast.dictionaries.load import load_dictionary
from querylens_fast.dictionaries.matrices import directions, neuron_dictionary

__all__ = ["Dictionary", "directions", "load_dictionary", "neuron_dictionary"]
