"""Before/after measurements on the hardware that is there."""
