"""How much the loss rises if a unit goes."""
