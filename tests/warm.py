"""What every process that a test starts would do first, done once in the server that it is forked from.

It does no arithmetic: a fork of a process whose OpenMP threads have started would wait for them forever.
"""

import functools
import gc

import sklearn.datasets

from hmn.results import code_version
from tests.command import TINY, planned

planned(*TINY)  # loads Hydra's plugins and the grammar of overrides
code_version()
sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)
sklearn.datasets.load_digits()
gc.collect()
gc.freeze()  # otherwise the first collection of every fork would copy all pages
