"""What each verb of the command line does with the rest of the line: parse, refuse a mistake, call, print.

NOTE: torch, Ray and Hydra are imported inside the verbs that need them, once the line has been understood: that is what keeps
`distcond --help` and the refusal of a mistake below a second.
"""
