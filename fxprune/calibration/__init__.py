"""Running calibration samples through a program, and recording what it computes."""
