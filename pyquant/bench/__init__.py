"""Measuring GEMMs: ``cpu`` beside torch's own, ``gpu`` beside other libraries and the time to read the weight."""
