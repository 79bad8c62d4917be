"""What is put in the place of the host's classes, in the driver and in its Ray actors."""
