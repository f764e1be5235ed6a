"""Evaluation of models: suites of tasks, their results, and the gate that compares a model with its parent."""
