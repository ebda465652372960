"""Queries over result files: one layer that pages, the HTTP API and Python share.

    results = ql.open_results("results/")
    results.feature("sae_layer6", 1234).signatures[0].top
    results.search(" Paris", side="key").rows

`views` holds the types of the answers, `display` the form of tokens that people see.
"""

from querylens_fast.queries.budget import Budget, QueryStopped
from querylens_fast.queries.files import ResultGone
from querylens_fast.queries.query import Filter
from querylens_fast.queries.results import Results, open_results

__all__ = ["Budget", "Filter", "QueryStopped", "ResultGone", "Results", "open_results"]
