"""The contract of passes, and the driver that runs them."""
