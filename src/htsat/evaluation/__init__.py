"""How good is a model on labelled recordings: posteriors, scores with intervals, and reports."""
