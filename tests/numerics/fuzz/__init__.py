"""The functions of test_fuzz.py: each draws a case, runs it and compares it with the truth."""
