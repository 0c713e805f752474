"""Third-party evaluators (OpenCompass, lm-eval), run as programs in a separate virtual environment.

environment    the environment: installation and completeness
model          the given model, as a folder that the evaluators can read
custom         a user's own questions, checked before the evaluation starts
process        runs one program: log, progress, signals
opencompass, lm_eval   command lines, and results as a table
"""
