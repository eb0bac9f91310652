"""Training with the dense model as a teacher, and what it is judged by."""
