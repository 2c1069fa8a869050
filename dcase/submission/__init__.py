"""The folder of a submission to the challenge: its parts, their checks, and the code that runs in it.

package                       the folder, its files and their places
challenge_api, inference      copied into it: what the challenge calls, and what that needs
probe                         calls the package as the challenge does, for the validator
output, meta, meta_check      output.csv and meta.yaml, made and checked
"""
