"""Measurements of kimivl beside other software; `data.py` is the data layer's."""
