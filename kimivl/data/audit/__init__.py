"""The audit: what each step took, written as it happens, and proved afterwards."""
