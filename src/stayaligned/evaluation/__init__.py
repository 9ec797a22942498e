"""From a model's completions to numbers with intervals: judges, verdicts, metrics and results."""
