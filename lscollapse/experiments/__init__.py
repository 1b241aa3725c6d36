"""What is run: the paper's experiments, your model, Table 1, the bounds."""
