"""These modules measure for benchmark.py; results/ holds what they measured."""
