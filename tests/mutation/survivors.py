"""Mutants that no test can catch, and why. Known by file, the line's text, operator and new line.

An entry says why the mutated program is right: its results, bytes moved and refusals are the same.
"""

EQUIVALENT: dict[tuple[str, str, str, str], str] = {}
