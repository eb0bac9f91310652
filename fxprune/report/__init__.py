"""What a run or an inspection tells, and how it looks."""
