"""What users write, as values: pipelines, options, names of data and models."""
