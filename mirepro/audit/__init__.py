"""Audits of published results: nobody is trusted, every table cell gets a verdict with its reason.

`source` makes a throw-away copy, `integrity` (level 0), `recompute` (level 1) and `rerun` (levels 2 and 3) gather
evidence from it, `verdicts` judges the evidence under a `policy`, `statement` and `page` write and sign what was found.
"""
