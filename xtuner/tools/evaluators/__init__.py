"""Others' evaluators (OpenCompass, lm-eval), run as programs of an environment of their own.

environment    where they are installed, and whether that is whole
model          what is given, as a folder that they can read
custom         rows of a user's own file, checked before anything starts
process        one program run: log, progress, signals
opencompass, lm_eval   command lines, and results as a table
"""
